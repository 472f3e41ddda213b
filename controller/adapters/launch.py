"""Starting: attempts that can tell that they failed, say why, and take back what they started.

Whether the server listens is not decided here but in process.py.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import BinaryIO, Protocol

from controller.adapters import procfs
from controller.adapters.pidfd import Identity, readable, send, wait_gone
from controller.adapters.systemd import Unit
from controller.ports import ProcessError

_MARK = "HEADGATE_START"
_LINES, _BYTES = 20, 8192  # of output in an error
# What systemd tells the daemon about itself would mislead a server that speaks to systemd too, as gunicorn does.
OURS = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


async def run_command(
    command: Sequence[str],
    directory: str | None,
    environment: Mapping[str, str],
    log: str | None,
    mark: str,
    limit: float,
) -> None:
    """Run a command to its end within `limit` seconds; ProcessError with what it printed, and nothing of it is left.

    What a daemon that was killed left of a command with the same `mark` is ended first.
    """
    attempt = await CommandAttempt.begin(command, directory, environment, log, mark)
    await attempt.wait(limit)
    how = attempt.ended() if attempt.over() else f"did not end within {limit:g} s"
    if how:
        await attempt.undo()
        message = f"`{shlex.join(command)}` {how}; it printed: {await attempt.printed() or 'nothing'}"
        raise ProcessError(message, "mend the command, or what it works on")


class Attempt(Protocol):
    """Something that has been started and is to listen soon."""

    def ended(self) -> str | None:
        """How it ended, in words, where that means that it cannot succeed by itself any more."""

    async def wait(self, seconds: float) -> None:
        """Wait so long, or until it ends."""

    async def printed(self) -> str:
        """The last lines that it printed."""

    async def undo(self) -> None:
        """End all that it started, and nothing else."""


class UnitAttempt:
    """A unit that systemd calls started."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit

    @classmethod
    async def begin(cls, unit: Unit, timeout: float) -> UnitAttempt:
        """Start the unit; ProcessError, with its last log lines, and then it is stopped."""
        attempt = cls(unit)
        try:
            await unit.start(timeout)
        except ProcessError:
            await attempt.undo()
            raise
        return attempt

    def ended(self) -> str | None:
        """A unit that was started and has no process now has ended, whatever its exit status."""
        return f"stopped (unit {self._unit.name})"

    async def wait(self, seconds: float) -> None:
        """Wait so long."""
        await asyncio.sleep(seconds)

    async def printed(self) -> str:
        """The unit's status and last log lines."""
        return await self._unit.report()

    async def undo(self) -> None:
        """Queue the unit's stop, which also ends its automatic restarts."""
        await self._unit.stop()


class CommandAttempt:
    """A command in a session of its own, which lives on when the daemon ends and is reaped while the daemon lives."""

    def __init__(self, child: subprocess.Popen[bytes], output: BinaryIO, start: int, mark: str) -> None:
        self._child = child
        self._output = output
        self._start = start
        self._mark = mark
        self._reaper = asyncio.ensure_future(self._reap())

    @classmethod
    async def begin(
        cls,
        command: Sequence[str],
        directory: str | None,
        environment: Mapping[str, str],
        log: str | None,
        mark: str,
    ) -> CommandAttempt:
        """Run `command`, appending what it prints to `log`; ProcessError where it cannot be run at all.

        What is left of an earlier one with the same `mark` is ended first; where that is empty it gets a new one.
        """
        if mark:
            await _end(partial(_marked, mark))
        mark = mark or secrets.token_hex(8)
        inherited = {name: value for name, value in os.environ.items() if name not in OURS}
        try:
            # A file and not a pipe: a pipe would break when the daemon ends.
            output: BinaryIO = open(log, "a+b", 0) if log else tempfile.TemporaryFile("a+b", 0)  # noqa: ASYNC230, SIM115
        except OSError as error:
            message = f"log {log or tempfile.gettempdir()}: {error.strerror}"
            raise ProcessError(message, "create its directory, or correct log in headgate.toml") from error
        start = output.tell()  # the child shares this position, so it is known only now
        try:
            child = subprocess.Popen(  # noqa: ASYNC220 - a child of asyncio's would be killed with the event loop
                command,
                cwd=directory,
                env={**inherited, **environment, _MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            output.close()
            message = f"`{shlex.join(command)}` in {directory or os.getcwd()}: {error.strerror} ({error.filename})"
            raise ProcessError(message, "correct the command or directory in headgate.toml") from error
        return cls(child, output, start, mark)

    def ended(self) -> str | None:
        """How it failed; None while it runs, and after exit status 0: it has gone into the background."""
        code = self._child.returncode
        if not code:
            return None
        return (
            f"was killed by signal {-code} ({signal.strsignal(-code)})"
            if code < 0
            else f"ended with exit status {code}"
        )

    async def wait(self, seconds: float) -> None:
        """Wait so long, or until it ends."""
        if self._reaper.done():
            await asyncio.sleep(seconds)
        else:
            await asyncio.wait([self._reaper], timeout=seconds)

    async def printed(self) -> str:
        """The last lines that it printed since it was started."""
        size = os.fstat(self._output.fileno()).st_size
        offset = max(self._start, size - _BYTES)
        text = os.pread(self._output.fileno(), _BYTES, offset).decode(errors="replace")
        return "\n".join(text.rstrip().splitlines()[-_LINES:])

    def over(self) -> bool:
        """Whether the command itself has ended."""
        return self._reaper.done()

    async def undo(self) -> None:
        """KILL its session, and what left it with our mark in its environment, as a daemonised gunicorn does."""
        # Until the child is reaped its session's id cannot be another's.
        await _end(lambda: _marked(self._mark, self._child.pid if self._child.returncode is None else None))

    async def _reap(self) -> None:
        descriptor = os.pidfd_open(self._child.pid)
        try:
            await readable(descriptor)
        finally:
            os.close(descriptor)
        self._child.wait()


async def _end(members: Callable[[], list[Identity]]) -> None:
    for _ in range(5):  # a member may fork while the others are killed
        if not (found := await asyncio.to_thread(members)):
            return
        for member in found:
            send(member, signal.SIGKILL)
        await wait_gone(found, 1.0)


def _marked(mark: str, session: int | None = None) -> list[Identity]:
    """What carries the mark, and the whole of a session."""
    words = f"{_MARK}={mark}".encode()
    return [
        (process.pid, process.created)
        for process in procfs.table().values()
        if process.session == session or words in procfs.environment(process.pid)
    ]
