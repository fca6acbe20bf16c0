"""How often something was made durable: fsync and fdatasync, by file.

:class:`SyncCounter` sees what Python code of this process syncs. Libraries in C (SQLite) sync
behind its back; :func:`count_syncs` runs a child process under a small shared library, compiled
on the spot, that writes down each call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import os
from pathlib import Path
import subprocess
import threading
from types import ModuleType, TracebackType
from typing import Any, Final

_NAMES: Final = ("fsync", "fdatasync")
_TRACE_VARIABLE: Final = "TRIALSTORE_SYNC_TRACE"
_MARK: Final = "#"


class SyncCounter:
    """Counts syncs of this process's Python code while it is entered.

    Args:
        hooks: More places that hold a sync function of one file descriptor, as pairs of module
            and name, for code that did ``from os import fsync``.

    Attributes:
        by_file: Number of syncs by path, as the system names the descriptor.
    """

    def __init__(self, hooks: Sequence[tuple[ModuleType, str]] = ()) -> None:
        self._hooks = [(os, name) for name in _NAMES if hasattr(os, name)] + list(hooks)
        self._originals: list[tuple[ModuleType, str, Callable[[Any], None]]] = []
        self._lock = threading.Lock()
        self.by_file: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.by_file.total()

    def __enter__(self) -> SyncCounter:
        for module, name in self._hooks:
            original = getattr(module, name)
            self._originals.append((module, name, original))
            setattr(module, name, self._counted(original))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._originals:
            module, name, original = self._originals.pop()
            setattr(module, name, original)

    def _counted(self, original: Callable[[Any], None]) -> Callable[[Any], None]:
        def sync(file: Any) -> None:
            path = _path_of(file)
            with self._lock:
                self.by_file[path] += 1
            original(file)

        return sync


def _path_of(file: Any) -> str:
    number = file if isinstance(file, int) else file.fileno()
    try:
        return str(Path(f"/proc/self/fd/{number}").readlink())
    except OSError:
        return f"descriptor {number}"


class SyncTrace:
    """The syncs of a child process in order, with the marks that it set between them."""

    def __init__(self, lines: Sequence[str], stdout: str) -> None:
        self._lines = list(lines)
        self.stdout = stdout

    def by_file(self, after: str | None = None, before: str | None = None) -> Counter[str]:
        """Number of syncs by file name, between two marks.

        Raises:
            ValueError: The child did not set such a mark.
        """
        first = 0 if after is None else self._lines.index(_MARK + after) + 1
        end = len(self._lines) if before is None else self._lines.index(_MARK + before)
        return Counter(
            Path(line).name for line in self._lines[first:end] if not line.startswith(_MARK)
        )

    def __int__(self) -> int:
        return self.by_file().total()


def mark_syncs(name: str) -> None:
    """In a child of :func:`count_syncs`: set a mark into the trace. Elsewhere: nothing."""
    path = os.environ.get(_TRACE_VARIABLE)
    if path:
        with Path(path).open("a") as trace:
            trace.write(f"{_MARK}{name}\n")


def count_syncs(
    argv: Sequence[str],
    folder: Path,
    *,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 240.0,
) -> SyncTrace:
    """Run a program to its end and write down its syncs, those of its children included.

    Args:
        argv: The program and its arguments; dynamically linked.
        folder: For the shared library and the trace.
        env: Environment instead of this process's.
        timeout_s: How long the program may take.

    Raises:
        RuntimeError: There is no C compiler, or the program failed; its errors are in the message.
    """
    trace = folder / "syncs.trace"
    trace.write_text("")
    environment = dict(os.environ if env is None else env)
    environment["LD_PRELOAD"] = str(_build_shim(folder))
    environment[_TRACE_VARIABLE] = str(trace)
    child = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if child.returncode:
        raise RuntimeError(f"{argv[0]} ended with {child.returncode}:\n{child.stderr}")
    return SyncTrace(trace.read_text().splitlines(), child.stdout)


_SHIM_SOURCE: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void note(int fd) {
    int saved = errno;
    const char *trace = getenv("TRIALSTORE_SYNC_TRACE");
    char link[64], line[4097];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, line, sizeof line - 1);
    if (trace && length > 0) {
        int out = open(trace, O_WRONLY | O_APPEND | O_CLOEXEC);
        if (out >= 0) {
            line[length] = '\n';
            ssize_t written = write(out, line, length + 1);
            (void)written;
            close(out);
        }
    }
    errno = saved;
}

#define COUNTED(name) \
    int name(int fd) { \
        static int (*real)(int); \
        if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name); \
        note(fd); \
        return real(fd); \
    }

COUNTED(fsync)
COUNTED(fdatasync)
"""


def _build_shim(folder: Path) -> Path:
    source, library = folder / "syncs.c", folder / "syncs.so"
    if library.exists():
        return library
    source.write_text(_SHIM_SOURCE)
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError("Counting syncs of a program needs a C compiler, cc.") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"The shared library could not be built:\n{error.stderr}") from error
    return library
