"""How fast trialstore is, beside Optuna and Rustuna in the same run; README.md has the results."""
