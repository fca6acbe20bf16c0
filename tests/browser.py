"""A real browser without a window: Chromium, driven by chromedriver's HTTP.

Where there is none, or it can't start, the test is skipped, in CI as well: what the page asks of a
storage is asked by ``tests/cli/test_every_command.py`` in any case.

Source: W3C, WebDriver, "Endpoints".
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import time
from typing import Any
import urllib.error
import urllib.request

import pytest

from servers import die_with_parent

_DEADLINE_S = 100.0
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # which root is refused
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--window-size=1280,1040",
)


class Browser:
    """One page at a time.

    Args:
        folder: For what it would leave in the user's home.
    """

    def __init__(self, folder: Path) -> None:
        driver = shutil.which("chromedriver")
        if driver is None:
            pytest.skip("chromedriver is not installed (Debian: chromium-driver)")
        self._process = subprocess.Popen(
            [driver, "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HOME": str(folder), "TMPDIR": str(folder)},
            preexec_fn=die_with_parent,
        )
        self._session = ""
        try:
            assert self._process.stdout is not None
            started = (
                re.search(r"successfully on port (\d+)", line) for line in self._process.stdout
            )
            port = next((found[1] for found in started if found), None)
            if port is None:
                pytest.skip("chromedriver did not start")
            self._url = f"http://localhost:{port}/session"
            options = {"goog:chromeOptions": {"args": _ARGUMENTS}}
            try:
                answer = self._ask("POST", "", capabilities={"alwaysMatch": options})
            except OSError as error:
                pytest.skip(f"Chromium did not start: {error}")
            self._session = f"/{answer['sessionId']}"
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End Chromium, which outlives its driver, and the driver."""
        if self._session:
            with contextlib.suppress(OSError):
                self._ask("DELETE", "")
        self._process.terminate()
        self._process.communicate()

    def open(self, url: str) -> None:
        """Load a page; tried again until its server listens."""
        give_up_at = time.monotonic() + _DEADLINE_S
        while True:
            try:
                self._ask("POST", "/url", url=url)
                return
            except urllib.error.HTTPError:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(0.1)

    def wait_for(self, *texts: str) -> str:
        """The text of the page, as soon as it shows all of these, in this order.

        Raises:
            AssertionError: It did not within a generous deadline.
        """
        pattern = re.compile(".*".join(map(re.escape, texts)), re.DOTALL)
        give_up_at = time.monotonic() + _DEADLINE_S
        while True:
            shown: str = self._ask(
                "POST", "/execute/sync", script="return document.body.innerText", args=[]
            )
            if pattern.search(shown):
                return shown
            assert time.monotonic() < give_up_at, f"{texts} are not on the page:\n{shown}"
            time.sleep(0.1)

    def _ask(self, method: str, path: str, **arguments: Any) -> Any:
        request = urllib.request.Request(
            self._url + self._session + path,
            method=method,
            data=json.dumps(arguments).encode() if method == "POST" else None,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_DEADLINE_S) as answer:
            return json.load(answer)["value"]
