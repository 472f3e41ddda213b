"""What a gunicorn master looks like from outside, for versions 20.1 to 27 and every worker class.

Recognising belongs here, and only that; looking into /proc stands in procfs.py, signalling in process.py.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Collection, Mapping

from controller.adapters import procfs

# Arbiter.SIGNALS and SIGCHLD. A worker sets HUP, USR2 and CHLD back to their defaults (Worker.init_signals), so the
# mask tells a master from its workers, which have the same command line.
_CAUGHT = ("HUP", "QUIT", "INT", "TERM", "TTIN", "TTOU", "USR1", "USR2", "WINCH", "CHLD")
_MASK = sum(1 << (signal.Signals[f"SIG{name}"] - 1) for name in _CAUGHT)


def masters(holders: Collection[int], processes: Mapping[int, procfs.Process]) -> set[int]:
    """The gunicorn masters behind these holders of a listening socket; PermissionError.

    A master that holds nothing itself counts too: with `reuse_port` only its workers do. A program that an
    application runs is not traced back to the application's own master, whatever it listens on.
    """
    found = set()
    for holder in holders:
        for pid in procfs.lineage(holder, processes):
            if is_master(pid, processes):
                found.add(pid)
                break
            if not is_fork(pid, processes[pid].parent):
                break
    return found


def is_master(pid: int, processes: Mapping[int, procfs.Process]) -> bool:
    """Whether this is a gunicorn master, and not a copy that it has just forked; PermissionError."""
    if pid not in processes or not _catches(pid) or not looks_like(pid):
        return False
    parent = processes[pid].parent
    return not (parent in processes and _catches(parent) and is_fork(pid, parent))


def looks_like(pid: int) -> bool:
    """Whether its command line, its title or its program says gunicorn or Python; PermissionError."""
    if any("gunicorn" in word for word in procfs.command(pid)):
        return True
    program = os.path.basename(procfs.executable(pid))
    return program.startswith(("python", "pypy"))


def workers(master: int, processes: Mapping[int, procfs.Process]) -> tuple[tuple[int, float], ...]:
    """(pid, created) of what the master forked; not a new master (USR2) or a program that it runs; PermissionError."""
    children = (process for process in processes.values() if process.parent == master)
    return tuple((child.pid, child.created) for child in children if is_fork(child.pid, master))


def booted(worker: int) -> bool:
    """Whether a worker has loaded its application and accepts requests; PermissionError.

    From then on it beats: it sets the times of a nameless temporary file of its own to the monotonic clock, or its
    mode (`WorkerTmp.notify`, before 20.1).
    """
    beats = []
    try:
        with os.scandir(f"/proc/{worker}/fd") as entries:
            for entry in entries:
                if "/wgunicorn-" in os.readlink(entry.path):
                    file = os.stat(entry.path)
                    beats.append(file.st_mtime < file.st_ctime / 2 or stat.S_IMODE(file.st_mode) != 0o600)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return bool(beats) and all(beats)


def successor(master: int, processes: Mapping[int, procfs.Process]) -> int | None:
    """What USR2 started beside this master, which may not be a master yet; PermissionError."""
    program = procfs.executable(master)
    children = [process.pid for process in processes.values() if process.parent == master]
    others = [pid for pid in children if not is_fork(pid, master) and procfs.executable(pid) == program]
    return next((pid for pid in others if is_master(pid, processes)), max(others, default=None))


def hides_http(master: int) -> bool:
    """Whether USR2 would run gunicorn/__main__.py as a script: its directory, with gunicorn's own `http`, comes first
    on the new master's path then, before Python's."""
    words = procfs.command(master)
    as_module = any(word.endswith("gunicorn/__main__.py") for word in words) or "-m gunicorn" in " ".join(words)
    safe = any(entry.startswith(b"PYTHONSAFEPATH=") for entry in procfs.environment(master))
    return as_module and not safe


def is_fork(pid: int, parent: int) -> bool:
    """Whether `pid` still runs the image of its parent: exec gives a process a new auxiliary vector, fork a copy.

    PermissionError where the parent could be a master and may not be read.
    """
    try:
        theirs = _read(parent, "auxv")
    except PermissionError:
        if _catches(parent):
            raise
        return False  # pid 1, most often, which nobody may read and which adopts whatever lost its parent
    return _read(pid, "auxv") == theirs != b""


def _catches(pid: int) -> bool:
    caught = next((line for line in _read(pid, "status").splitlines() if line.startswith(b"SigCgt:")), b":0")
    return int(caught.partition(b":")[2], 16) & _MASK == _MASK


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return b""
