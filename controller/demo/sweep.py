"""Ending everything that belongs to a stage: its processes, wherever they hang in the process tree, and its files.

`python -m controller.demo.sweep PREFIX` is the stage's watchdog: it waits for the end of its standard input, which
comes when the demo closes it or dies by whatever cause, and then sweeps.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

MARK = "HEADGATE_STAGE"
PATIENCE = 8.0


def members(prefix: Path) -> list[psutil.Process]:
    """The living processes of a stage: those with its mark in their environment, and its nginx.

    nginx overwrites the memory that /proc shows as its environment, so it is known by its name and its directory.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            marked = process.environ().get(MARK) == str(prefix)
            if marked or (process.name() == "nginx" and process.cwd() == str(prefix)):
                found.append(process)
    return found


def sweep(prefix: Path, patience: float = PATIENCE) -> None:
    """End the stage's processes (asked, after `patience` seconds KILL), wait until all are gone, delete its files."""
    asked: set[psutil.Process] = set()
    deadline = time.monotonic() + patience
    while here := members(prefix):
        late = time.monotonic() > deadline
        for process in here:
            with contextlib.suppress(psutil.NoSuchProcess):
                if late:
                    process.kill()
                elif process not in asked:  # one may have been started meanwhile, by the daemon
                    # At TERM gunicorn would wait for the daemon, which ends as well.
                    process.send_signal(signal.SIGINT if "gunicorn" in process.cmdline() else signal.SIGTERM)
        asked.update(here)
        psutil.wait_procs(here, timeout=0.2)
    shutil.rmtree(prefix, ignore_errors=True)


def _watch() -> None:
    prefix = Path(sys.argv[1])
    sys.stdin.read()
    sweep(prefix)


if __name__ == "__main__":
    _watch()
