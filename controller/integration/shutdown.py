"""The shutdown flag: one byte that a process shares with all that it forks after it has imported this module.

gunicorn.conf.py imports it in the master, so that whoever sets it there tells every worker at once.
"""

from __future__ import annotations

import mmap
import os
import signal
from types import FrameType

_memory = mmap.mmap(-1, 1)


def begun() -> bool:
    """Whether this server is going offline."""
    return _memory[0] != 0


def begin() -> None:
    """Say so, to every process of the family. There is no way back: the next start of the server begins afresh."""
    _memory[0] = 1


def begin_on_term() -> None:
    """Let SIGTERM to this very process be the beginning, before whatever it does already.

    For servers other than gunicorn, called when they have set their own handlers (a lifespan's or framework's start
    hook), in the main thread (else ValueError). Not in a gunicorn worker: there it also means that merely this worker
    is replaced, which must not take the whole server away.
    """
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        begin()
        if callable(before):
            before(number, frame)
        elif before is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, handle)
