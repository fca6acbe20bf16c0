"""What a file says that holds a password, and what it must not say."""

from __future__ import annotations

from pathlib import Path
import traceback

import pytest

from trialstore.credentials import Secret
from trialstore.errors import SecretNotFoundError


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_only_line_ends_are_not_of_the_password(tmp_path: Path, end: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes(f" \tpass word {end}".encode())
    assert Secret(file=str(path)).read() == " \tpass word "


@pytest.mark.parametrize(
    ("content", "why"), [(b"\n", "no password"), (b"", "no password"), (b"hunter\xff", "UTF-8")]
)
def test_a_file_without_a_password_is_named_and_not_shown(
    tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    with pytest.raises(SecretNotFoundError, match=why) as raised:
        Secret(file=str(path)).read()
    assert str(path) in str(raised.value)
    assert "hunter" not in "".join(traceback.format_exception(raised.value))
