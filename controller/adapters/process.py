"""Headgate's hands on server processes: found, verified, terminated, waited for, killed and started.

This is where the parts meet: gunicorn.py knows a master when it sees one, procfs.py reads /proc, pidfd.py signals and
waits, systemd.py drives units, launch.py runs commands, arbiter.py has a gunicorn master change its workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence

from controller.adapters import arbiter, gunicorn, procfs
from controller.adapters.launch import Attempt, CommandAttempt, UnitAttempt, run_command
from controller.adapters.pidfd import Identity, is_alive, send, wait_gone
from controller.adapters.systemd import Unit
from controller.adapters.trial import passed
from controller.core.model import Master, Server
from controller.core.policy import ProcessPolicy
from controller.ports import ProcessError, Trial

_POLL = 0.05  # seconds; nobody is told when a socket begins to listen
_KILL_WAIT = 5.0  # seconds that a killed process may take to vanish
_SEE = "run the daemon as the same user, or give it CAP_SYS_PTRACE"


class NotListening(ProcessError):
    """The process is there and does not listen: it is starting or stopping."""


class Processes:
    """`controller.ports.ProcessControl` on this machine: gunicorn masters and systemd units."""

    def __init__(self) -> None:
        self._terminated: dict[Identity, frozenset[Identity]] = {}  # a master, and its family when it was told to end

    async def find(self, upstream: str, server: Server, policy: ProcessPolicy) -> Master | None:
        """The verified master: of the unit, else of the pid file, else the one behind the listening socket.

        None where nothing runs. ProcessError where a process runs that cannot be trusted to be it, or one that does
        not listen (NotListening).
        """
        unit: Unit | None = None
        if policy.unit:
            unit = Unit(fill(policy.unit, upstream, server))
            state = await unit.state()
            if state.main is None and state.active in ("activating", "deactivating", "reloading"):
                message = f"unit {unit.name} is {state.active} and has no main process"
                raise NotListening(message, f"see `systemctl status {unit.name}`")
            named, pid = f"unit {unit.name}", state.main
        elif policy.kind != "gunicorn":
            message = f"{server.address}: a process of kind {policy.kind} is driven by its unit, and none is set"
            raise ProcessError(message, f'set unit or kind = "gunicorn" in [upstream.{upstream}.process]')
        else:
            named = _path(policy, policy.pid_file, upstream, server) or ""
            pid = await asyncio.to_thread(_read_pid, named) if named else None
        try:
            return await asyncio.to_thread(_look, server, policy.kind == "gunicorn", named, pid, unit)
        except PermissionError as error:
            raise ProcessError(f"{server.address}: {error.filename or error} may not be read", _SEE) from error

    async def terminate(self, master: Master, policy: ProcessPolicy) -> None:
        """TERM to the master, or a queued stop of its unit. A master that is gone, or going, is fine."""
        identity = (master.pid, master.created)
        family = await self._living(master)
        if identity not in family:
            return
        self._terminated[identity] = frozenset(family)
        if not master.unit:
            send(identity, signal.SIGTERM, master.executable)
        elif await _still_runs(master.unit, master):
            await Unit(master.unit).stop()
        else:
            message = f"pid {master.pid} does not belong to the main process of unit {master.unit}"
            raise ProcessError(message, f"see `systemctl status {master.unit}`")

    async def unreplaced(self, upstream: str, server: Server, master: Master, policy: ProcessPolicy) -> None:
        """Return when the master lives, or nothing serves in its place; ProcessError, naming what does.

        What is there and does not listen is waited for, up to start_timeout, to see what becomes of it.
        """
        with _seeing(master):
            if await asyncio.to_thread(is_alive, (master.pid, master.created), master.executable):
                return
        deadline = asyncio.get_running_loop().time() + policy.start_timeout
        while True:
            try:
                other = await self.find(upstream, server, policy)
                break
            except NotListening:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            await asyncio.sleep(_POLL)
        if other:
            message = f"{server.address}: the master {master.pid} has ended, and pid {other.pid} serves in its place"
            raise ProcessError(
                message, "see what started that: it must not while headgate stops or deploys; then try again"
            )

    async def wait_exit(self, master: Master, timeout: float) -> bool:
        """Whether the master and its workers (as found, as terminated, as now) were gone within `timeout` seconds."""
        gone = await wait_gone(await self._living(master), timeout)
        if gone:
            self._terminated.pop((master.pid, master.created), None)
        return gone

    async def kill(self, master: Master, policy: ProcessPolicy) -> tuple[int, ...]:
        """KILL the master, then its workers, each verified, and wait for their end; the pids that were alive.

        With a unit the rest of its control group goes as well.
        """
        family = await self._living(master)
        if family and master.unit and await _still_runs(master.unit, master):
            await Unit(master.unit).kill()
        for member in family:
            send(member, signal.SIGKILL, master.executable if member[0] == master.pid else None)
        if not await wait_gone(family, _KILL_WAIT):
            left = ", ".join(str(member[0]) for member in family if is_alive(member))
            message = f"pid {left} has not ended {_KILL_WAIT:g} s after KILL"
            raise ProcessError(message, "it hangs in the kernel (state D in ps): look at its disks and mounts")
        self._terminated.pop((master.pid, master.created), None)
        return tuple(pid for pid, _ in family)

    async def start(self, upstream: str, server: Server, policy: ProcessPolicy, mark: str = "") -> Master:
        """Start it by its unit or command, unless it runs, and return its master once it listens.

        One that is starting already, since a daemon that crashed began it, is waited for where the unit or pid file
        shows it; else it is known by its `mark`, and ended first. ProcessError with what it printed where it ends
        before it listens or does not listen within start_timeout; then what this call started is killed.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + policy.start_timeout
        attempt: Attempt | None = None
        waiting: NotListening | None = None
        while True:
            ended = attempt.ended() if attempt else None
            try:
                waiting = None
                if (master := await self.find(upstream, server, policy)) is not None:
                    return master
            except NotListening as error:
                waiting = error
            except ProcessError:
                if attempt:
                    await attempt.undo()
                raise
            late = clock() >= deadline
            if attempt and (late or (ended and not waiting)):
                how = f"did not listen within {policy.start_timeout:g} s" if late else f"{ended} before it listened"
                await attempt.undo()
                message = f"{server.address} {how}; it printed: {await attempt.printed() or 'nothing'}"
                raise ProcessError(message, "see its log; start_timeout in headgate.toml says how long it may take")
            if late and waiting:
                raise waiting
            if attempt:
                await attempt.wait(_POLL)
            elif waiting:
                await asyncio.sleep(_POLL)
            else:
                attempt = await _begin(upstream, server, policy, mark, deadline - clock())

    async def ended(self, master: Master, timeout: float) -> bool:
        """Whether the master itself ended within `timeout` seconds."""
        return await wait_gone([(master.pid, master.created)], timeout)

    async def reload(self, master: Master) -> Master:
        """HUP; the master with the workers that it had then."""
        with _seeing(master):
            return await arbiter.reload(master)

    async def renewed(self, master: Master, policy: ProcessPolicy) -> Master:
        """Wait until its workers have ended and others accept requests; the master with those."""
        with _seeing(master):
            return await arbiter.renewed(master, policy.graceful_timeout + policy.margin + policy.start_timeout)

    async def upgrade(self, server: Server, master: Master, policy: ProcessPolicy, trial: Trial) -> Master:
        """USR2; the new master once it listens and its workers pass their trial. One that does not get so far is ended.

        After a crash the new master that is there already is waited for. Where the old one has ended meanwhile the new
        one is left: there would be nothing else.
        """
        new: Master | None = None
        with _seeing(master):
            try:
                new = await arbiter.upgrade(server, master, policy.start_timeout)
                await passed(server, master, new, trial)
            except ProcessError:
                failed = new or await arbiter.successor(master)
                beside = await asyncio.to_thread(is_alive, (master.pid, master.created))
                if failed and beside:
                    await self.terminate(failed, policy)
                    await self.wait_exit(failed, policy.margin)
                    await self.kill(failed, policy)
                raise
        return new

    async def scale(self, master: Master, workers: int, policy: ProcessPolicy) -> Master:
        """TTIN or TTOU until so many workers accept requests."""
        with _seeing(master):
            limit = policy.graceful_timeout + policy.margin + policy.start_timeout
            return await arbiter.scale(master, workers, limit)

    async def run(
        self, command: Sequence[str], upstream: str, server: Server, policy: ProcessPolicy, mark: str
    ) -> None:
        """Run `deploy` or `roll_back` with its placeholders filled, within deploy_timeout."""
        await run_command(
            [fill(word, upstream, server) for word in command],
            *_surroundings(upstream, server, policy),
            mark,
            policy.deploy_timeout,
        )

    async def _living(self, master: Master) -> list[Identity]:
        """The master, then its workers: those that were found, were there when it was terminated, or are there now."""
        identity = (master.pid, master.created)
        known = {*master.workers, *self._terminated.get(identity, ())} - {identity}

        def look() -> list[Identity]:
            family = sorted(member for member in known if is_alive(member))
            if not is_alive(identity, master.executable):
                return family
            return [identity, *sorted({*family, *_workers(master.pid, procfs.table())})]

        with _seeing(master):
            return await asyncio.to_thread(look)


def fill(text: str, upstream: str, server: Server) -> str:
    """`text` with `{upstream} {address} {host} {port}` replaced; other braces stay as they are.

    `{host}` is the server's IP address without brackets, or `unix:/path`.
    """
    values = {"upstream": upstream, "address": server.address, "host": server.ip, "port": str(server.port)}
    return re.sub(r"\{(upstream|address|host|port)\}", lambda match: values[match[1]], text)


def _path(policy: ProcessPolicy, path: str | None, upstream: str, server: Server) -> str | None:
    """A configured path with its placeholders filled, counted from `directory`."""
    if not path:
        return None
    return os.path.join(fill(policy.directory or "", upstream, server), fill(path, upstream, server))


def _read_pid(path: str) -> int | None:
    """The pid in a pid file; None where it is missing or empty."""
    remedy = "correct pid_file in headgate.toml, or remove the file if nothing of yours wrote it"
    try:
        with open(path, "rb") as file:
            text = file.read(64).strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ProcessError(f"pid file {path}: {error.strerror}", remedy) from error
    if text and not re.fullmatch(rb"[1-9]\d{0,9}", text):
        raise ProcessError(f"pid file {path} holds no pid but {text[:40]!r}", remedy)
    return int(text) if text else None


def _look(server: Server, is_gunicorn: bool, named: str, pid: int | None, unit: Unit | None) -> Master | None:
    """Follow the listening socket to a master that belongs to `pid`, which `named` (a unit or pid file) spoke of."""
    if pid is not None and procfs.read(pid) is None:
        pid = None
    local = procfs.is_local(server) or (pid is not None and not procfs.same_network(pid))
    inodes = procfs.listening(server, pid, wildcards=local)
    holders = procfs.holders(inodes)
    if inodes and not holders and inodes & procfs.listening(server, pid, wildcards=local):
        message = f"something listens on {server.address}, but its process cannot be seen"
        raise ProcessError(message, f"{_SEE}; or it runs in a container, where only a daemon inside can drive it")
    if not (holders or local):
        remedy = "a process can be driven only by a daemon on its own host"
        raise ProcessError(f"{server.address} is no address of this machine", remedy)
    processes = procfs.table()
    if pid not in processes:
        pid = None  # it ended meanwhile
    holders -= {1} if not gunicorn.is_master(1, processes) else set()  # systemd, for a socket unit
    if is_gunicorn:
        found = gunicorn.masters(holders, processes)
    else:
        found = {pid for holder in holders if pid is not None and procfs.within(holder, pid, processes)}
    if pid is not None:
        found = {master for master in found if procfs.within(master, pid, processes)}
        if not found:
            raise _not_it(server, named, pid, unit, holders)
    elif unit and holders:
        raise ProcessError(f"{_held(server, holders)}, and {named} does not run", "stop what holds the address")
    if not found:
        if not holders:
            return None
        remedy = "stop it, or correct the settings; gunicorn's workers can outlive a master that was killed"
        raise ProcessError(f"{_held(server, holders)}, which is no gunicorn master", remedy)
    if len(found) > 1:
        raise _several(server, found)
    process = processes[found.pop()]
    program = procfs.executable(process.pid)
    workers = _workers(process.pid, processes)
    return Master(process.pid, process.created, program, workers, unit.name if unit else None)


def _workers(master: int, processes: Mapping[int, procfs.Process]) -> tuple[Identity, ...]:
    if gunicorn.is_master(master, processes):
        return gunicorn.workers(master, processes)
    return tuple((child.pid, child.created) for child in processes.values() if child.parent == master)


def _not_it(server: Server, named: str, pid: int, unit: Unit | None, holders: Collection[int]) -> ProcessError:
    """Why process `pid` is not the one, though `named` says so."""
    if not holders and (unit or gunicorn.looks_like(pid)):
        message = f"pid {pid} in {named} does not listen on {server.address} (it is `{_command(pid)}`)"
        return NotListening(message, "it is starting or stopping, or binds another address than nginx knows")
    message = f"pid {pid} in {named} is not the process that listens on {server.address} (it is `{_command(pid)}`)"
    remedy = f"{_held(server, holders)}; stop that" if holders else "remove the pid file if it is a stale one"
    return ProcessError(message, remedy)


def _several(server: Server, masters: Collection[int]) -> ProcessError:
    """Two masters hold the address; ending either one would not be what was asked for."""
    remedy = "if USR2 started the newer one, finish that first: TERM the old one, or the new one to go back"
    return ProcessError(f"{_held(server, masters)}: more than one gunicorn master", remedy)


def _held(server: Server, pids: Collection[int]) -> str:
    return f"{server.address} is held by " + ", ".join(f"pid {pid} (`{_command(pid)}`)" for pid in sorted(pids)[:3])


def _command(pid: int) -> str:
    return shlex.join(procfs.command(pid))[:80] or "gone"


async def _still_runs(unit: str, master: Master) -> bool:
    """Whether the unit's main process is the master or runs it, or is gone while the unit ends."""
    main = (await Unit(unit).state()).main
    return main is None or procfs.within(master.pid, main, await asyncio.to_thread(procfs.table))


async def _begin(upstream: str, server: Server, policy: ProcessPolicy, mark: str, timeout: float) -> Attempt:
    if policy.unit:
        return await UnitAttempt.begin(Unit(fill(policy.unit, upstream, server)), timeout)
    if not policy.start:
        message = f"{server.address} cannot be started: no command is configured"
        raise ProcessError(message, f"set start, or unit, in [upstream.{upstream}.process]")
    command = [fill(word, upstream, server) for word in policy.start]
    return await CommandAttempt.begin(command, *_surroundings(upstream, server, policy), mark)


def _surroundings(
    upstream: str, server: Server, policy: ProcessPolicy
) -> tuple[str | None, dict[str, str], str | None]:
    """Working directory, environment and log of a configured command."""
    return (
        fill(policy.directory, upstream, server) if policy.directory else None,
        {name: fill(value, upstream, server) for name, value in policy.environment.items()},
        _path(policy, policy.log, upstream, server),
    )


@contextlib.contextmanager
def _seeing(master: Master) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise ProcessError(f"pid {master.pid}: {error.filename or error} may not be read", _SEE) from error
