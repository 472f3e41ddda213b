"""Looks at the processes behind the upstreams of this machine: gunicorns, uvicorns, and the units that they run in."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from controller.adapters import gunicorn, procfs
from controller.adapters.nginx.files import lookup
from controller.adapters.process import NotListening, Processes, fill
from controller.conf.parse import ServerLine
from controller.core.model import Place, Server
from controller.core.policy import ProcessPolicy
from controller.doctor import launch
from controller.doctor.model import App, Facts, Found, PidFile, is_address
from controller.ports import ProcessError

_ANSWER = 5.0  # seconds that systemctl or a look-up may take
_PROPERTIES = ("LoadState", "MainPID", "Restart", "KillMode", "KillSignal", "TimeoutStopUSec", "ExecReload")
_ASK = "ask as root, or as the user of these processes"


async def look(facts: Facts) -> Facts:
    """The facts with servers, apps, units and pid files of this machine."""
    looking = _Looking(facts)
    lines = [(block.name, line) for block in facts.upstreams for line in block.servers if "$" not in line.address]
    named = {line.host: line for _, line in lines if line.host and not is_address(line.host)}
    await asyncio.gather(*(looking.resolve(line) for line in named.values()))
    for upstream, line in lines:
        for server in looking.servers(line):
            await looking.look(upstream, server)
    return await asyncio.to_thread(looking.result)


class _Behind(NamedTuple):
    """The processes that serve an address: gunicorn masters, else one uvicorn."""

    pids: tuple[int, ...] = ()
    unseen: Found | None = None


class _Looking:
    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._names: dict[str, tuple[str, ...]] = {}
        self._servers: list[tuple[str, Server]] = []
        self._serves: dict[int | str, list[tuple[str, Server]]] = defaultdict(list)
        self._apps: dict[int | str, App] = {}
        self._behind: dict[tuple[str, int], _Behind] = {}
        self._units: dict[str, Mapping[str, str] | Found] = {}
        self._unfit: list[tuple[str, Server, str, str]] = []
        self._unseen: list[Found] = []

    async def resolve(self, line: ServerLine) -> None:
        """Look up the host name of a server line."""
        try:
            self._names[line.host] = await asyncio.wait_for(lookup(line.host), _ANSWER)
        except (OSError, UnicodeError, TimeoutError) as error:
            self._names[line.host] = ()
            reason = getattr(error, "strerror", None) or f"no answer within {_ANSWER:g} s"
            told = f"{line.host} does not resolve now ({reason}); nginx would refuse to start"
            remedy = "correct the name, or see to it that it resolves before nginx starts"
            self._unseen.append(Found(line.address, str(line.place), told, remedy))

    def servers(self, line: ServerLine) -> list[Server]:
        """The addresses of a server line."""
        ips = (f"unix:{line.unix}",) if line.unix else self._names.get(line.host, (line.host,))
        return [Server(line.address, line.address, ip, line.port, place=Place(*line.place)) for ip in ips]

    async def look(self, upstream: str, server: Server) -> None:
        """Find out what serves this address, and whether Headgate could drive it."""
        policy = self._facts.process(upstream)
        if procfs.is_local(server):
            self._servers.append((upstream, server))
        elif policy is None:
            return
        address = server.ip, server.port
        if address not in self._behind:
            self._behind[address] = await asyncio.to_thread(_processes_behind, server)
        behind = self._behind[address]
        if behind.unseen:
            self._unseen.append(behind.unseen)
            return
        unit = fill(policy.unit, upstream, server) if policy and policy.unit else ""
        for pid in behind.pids:
            self._serves[pid].append((upstream, server))
            if pid not in self._apps:
                self._apps[pid] = await asyncio.to_thread(self._running, pid, unit)
        if policy:
            await self._drive(upstream, server, policy)
        if policy and not behind.pids:
            self._absent(upstream, server, policy, unit)

    def result(self) -> Facts:
        """The facts with what was found; asks systemd about the units."""
        apps = tuple(replace(app, serves=tuple(self._serves[key])) for key, app in self._apps.items())
        units = {}
        for unit in dict.fromkeys(app.unit for app in apps if app.unit):
            properties = self._unit(unit)
            if isinstance(properties, Found):
                self._unseen.append(properties)
            else:
                units[unit] = properties
        return replace(
            self._facts,
            servers=tuple(self._servers),
            apps=apps,
            units=units,
            unfit=tuple(self._unfit),
            pid_files=(*self._facts.pid_files, *self._pid_files()),
            unseen=(*self._facts.unseen, *dict.fromkeys(self._unseen)),
        )

    async def _drive(self, upstream: str, server: Server, policy: ProcessPolicy) -> None:
        """See whether Headgate would find the process that it is to drive."""
        try:
            await Processes().find(upstream, server, policy)
        except ProcessError as error:
            if isinstance(error, NotListening) or isinstance(error.__cause__, PermissionError):
                where = self._facts.setting(f"upstream.{upstream}.process")
                self._unseen.append(Found(f"{upstream}: {server.address}", where, error.message, error.remedy))
            else:
                self._unfit.append((upstream, server, error.message, error.remedy))

    def _absent(self, upstream: str, server: Server, policy: ProcessPolicy, unit: str) -> None:
        """What can be told of a server that does not run: from its start command, or its unit."""
        command = tuple(fill(word, upstream, server) for word in policy.start)
        directory = fill(policy.directory or "", upstream, server)
        reading = launch.read(launch.Launch(command, policy.environment, directory), _read)
        where = f"unit {unit}" if unit else self._facts.setting(f"upstream.{upstream}.process.start")
        if unit:
            reading = launch.Reading({"graceful_timeout": policy.graceful_timeout}, None, None)
        if reading is not None:
            self._serves[where].append((upstream, server))
            self._apps[where] = self._app(where, reading, unit)

    def _running(self, pid: int, unit: str) -> App:
        where = f"pid {pid}"
        try:
            environment = dict(
                variable.decode("utf-8", "replace").partition("=")[::2] for variable in procfs.environment(pid)
            )
            words, directory = tuple(procfs.command(pid)), os.readlink(f"/proc/{pid}/cwd")
        except OSError as error:
            self._unseen.append(Found(where, where, f"it may not be looked at ({error.strerror})", _ASK))
            return App(where, ())
        began = launch.where_begun(launch.Launch(words, environment, directory), _read)
        unit = unit or self._unit_of(pid)
        return self._app(where, launch.read(began, _read) or launch.UNREAD, unit)

    def _app(self, where: str, reading: launch.Reading, unit: str) -> App:
        remedy = "compare its settings with docs/doctor.md by hand"
        self._unseen += [Found(where, where, why, remedy) for why in reading.hidden]
        return App(where, (), reading.known, reading.uvicorn, reading.keep_alive, reading.own_graceful, unit)

    def _unit(self, name: str) -> Mapping[str, str] | Found:
        if name not in self._units:
            self._units[name] = _properties(name)
        return self._units[name]

    def _unit_of(self, pid: int) -> str:
        """The unit whose main process this is. One that Headgate started belongs to Headgate's unit and is not it."""
        unit = _service((_read(f"/proc/{pid}/cgroup") or b"").decode("utf-8", "replace"))
        properties = self._unit(unit) if unit else {}
        return unit if isinstance(properties, Mapping) and properties.get("MainPID") == str(pid) else ""

    def _pid_files(self) -> list[PidFile]:
        files = {}
        processes = procfs.table()
        for upstream, server in self._servers:
            policy = self._facts.process(upstream)
            if policy and policy.pid_file:
                path = os.path.join(
                    fill(policy.directory or "", upstream, server), fill(policy.pid_file, upstream, server)
                )
                pid = read_pid(path)
                if os.path.exists(path):  # that a living one is the right one has been verified with the process
                    files[path] = PidFile(path, pid, pid in processes, pid in processes)
        return list(files.values())


def read_pid(path: str) -> int | None:
    """The number in a pid file; None where there is no file, or none that may be read, or no number in it."""
    text = (_read(path) or b"").strip()
    return int(text) if re.fullmatch(rb"[1-9]\d{0,9}", text) else None


def _processes_behind(server: Server) -> _Behind:
    inodes = procfs.listening(server)
    holders = procfs.holders(inodes)
    if inodes and not holders:
        message = "something listens there, and its process cannot be seen"
        return _Behind((), Found(server.address, server.address, message, _ASK))
    try:
        masters = gunicorn.masters(holders, procfs.table())
    except PermissionError as error:
        message = f"its process may not be looked at ({error.filename or error})"
        return _Behind((), Found(server.address, server.address, message, _ASK))
    if masters:
        return _Behind(tuple(sorted(masters)))
    commands = ((pid, tuple(procfs.command(pid))) for pid in sorted(holders))
    return _Behind(tuple(pid for pid, words in commands if launch.read(launch.Launch(words, {}, ""), _read))[:1])


def _service(cgroup: str) -> str:
    """The system service that /proc/PID/cgroup names; empty where the process is in none."""
    for line in cgroup.splitlines():
        parts = line.rpartition(":")[2].split("/")
        if parts[-1].endswith(".service") and "user.slice" not in parts:
            return parts[-1]
    return ""


def _properties(name: str) -> Mapping[str, str] | Found:
    """What systemd says of a unit."""
    command = ["systemctl", "show", "-p", ",".join(_PROPERTIES), "--", name]
    remedy = f"see `systemctl status {name}`"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or f"no answer within {_ANSWER:g} s"
        return Found(name, f"unit {name}", f"systemctl: {reason}", remedy)
    properties = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    if done.returncode or properties.get("LoadState") != "loaded":
        told = done.stderr.strip() or f"systemd calls it {properties.get('LoadState', 'unknown')}"
        return Found(name, f"unit {name}", told, remedy)
    return properties


def _read(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except OSError:
        return None
