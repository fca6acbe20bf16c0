"""What runs over gRPC: the log itself, and Optuna's storage service."""
