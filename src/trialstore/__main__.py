"""``python -m trialstore`` is the command ``trialstore``."""

from trialstore.cli import main

if __name__ == "__main__":
    main()
