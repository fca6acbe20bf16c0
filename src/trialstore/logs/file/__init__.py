"""A journal in one file, shared with plain Optuna workers."""

from trialstore.logs.file.log import FileLog

__all__ = ["FileLog"]
