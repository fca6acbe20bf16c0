"""Passwords that are kept elsewhere: read when they are needed, never stored, shown or pickled."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from trialstore.errors import SecretNotFoundError


class Secret(msgspec.Struct, frozen=True):
    """Where a password is kept; what a pickle of a storage carries instead of it.

    Args:
        file: Path of a file that holds it, as UTF-8; line ends after it do not count.
        variable: Name of an environment variable that holds it.
    """

    file: str | None = None
    variable: str | None = None

    def read(self) -> str:
        """The password, as it is now.

        Raises:
            SecretNotFoundError: The file or variable is not there, is empty, or is no text.
        """
        if self.file is not None:
            try:
                found = Path(self.file).read_text(encoding="utf-8").rstrip("\r\n")
            except OSError as error:
                raise SecretNotFoundError(
                    f"The secret {self.file!r} can't be read: {error.strerror}. Put the password "
                    "into that file, or name another."
                ) from error
            except UnicodeDecodeError:
                # Not from the error: that shows what is in the file.
                raise SecretNotFoundError(
                    f"The secret {self.file!r} is no UTF-8 text. Save the password as UTF-8."
                ) from None
        else:
            found = os.environ.get(self.variable or "", "")
        if not found:
            where = f"file {self.file!r}" if self.file else f"environment variable {self.variable}"
            raise SecretNotFoundError(f"The {where} holds no password.")
        return found


def secret(password_file: str | None, password_env: str | None) -> Secret | None:
    """What two options of a storage say. Raises ValueError if both are given."""
    if password_file is not None and password_env is not None:
        raise ValueError("Give password_file or password_env, not both.")
    if password_file is None and password_env is None:
        return None
    return Secret(password_file, password_env)
