"""Looks at this machine and gathers the facts: files and nginx here, server processes in servers.py.

Nothing is changed and no code of the user runs. What may not be looked at becomes an entry of `Facts.unseen`.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from controller.adapters.nginx import check
from controller.adapters.nginx.files import DiskReader
from controller.conf import tree
from controller.conf.parse import ConfSyntaxError, parse
from controller.doctor import servers
from controller.doctor.model import Facts, Found, Nginx, NginxMaster, NginxWorker, PathFact, PidFile
from controller.settings import Settings

_PID_PATH = "/run/nginx.pid"
_BOOT_PRECISION = 2.0  # seconds; the kernel dates processes by a boot time in whole seconds


async def gather(settings: Settings, settings_file: str) -> Facts:
    """Everything that can be seen from here; takes some seconds where systemd or host names answer slowly."""
    facts = await asyncio.to_thread(_nginx, Facts(settings=settings, settings_file=settings_file))
    facts = await servers.look(facts)
    return await asyncio.to_thread(_machine, facts)


class _Remembering:
    """Files of this machine, each read once."""

    def __init__(self) -> None:
        self._disk = DiskReader()
        self.contents: dict[str, bytes] = {}

    def read(self, path: str) -> bytes:
        if path not in self.contents:
            self.contents[path] = self._disk.read(path)
        return self.contents[path]

    def glob(self, pattern: str) -> Sequence[str]:
        return self._disk.glob(pattern)


def _nginx(facts: Facts) -> Facts:
    path = facts.settings.nginx.conf
    reader, unseen = _Remembering(), []
    try:
        facts = replace(facts, conf=tree.read(path, reader))
        facts = replace(facts, upstreams=parse(path, reader).upstreams)
    except ConfSyntaxError as error:
        if isinstance(error.__cause__, PermissionError):
            unseen.append(Found("nginx", str(error.place or path), str(error), "ask as root"))
        else:
            facts = replace(facts, broken=error)
    master = None
    try:
        found = check.find(path)
        master = found.master
        own = f"/proc/{master}/exe"  # the program on disk may be another one by now
        facts = replace(facts, nginx=_build(check.built_with(own if os.access(own, os.X_OK) else found.program)))
    except check.NginxMissing as error:
        unseen.append(Found("nginx", path, error.message, error.remedy))
    if master is None:
        told = "no running nginx with this configuration is seen"
        unseen.append(Found("nginx", path, told, "start it and ask again"))
    else:
        running = _master(master)
        facts = replace(facts, master=running, changed=_changed(reader.contents, running))
    pid_file = _pid_file(facts)
    if os.path.exists(pid_file.path) and (master is not None or pid_file.pid is not None):
        facts = replace(facts, pid_files=(pid_file,))
    return replace(facts, unseen=tuple(unseen))


def _build(said: str) -> Nginx:
    """What `nginx -V` tells; NginxMissing where it is no nginx."""
    version = re.search(r"version: ([\w-]+)/(\d+(?:\.\d+)+)", said)
    arguments = re.search(r"configure arguments: (.*)", said)
    if version is None:
        raise check.NginxMissing("`nginx -V` names no version", "put nginx first in PATH")
    numbers = tuple(int(number) for number in version[2].split("."))
    return Nginx(numbers, arguments[1] if arguments else "", version[1])


def _pid_file(facts: Facts) -> PidFile:
    compiled = dict(re.findall(r"--(pid-path|prefix)=(\S+)", facts.nginx.arguments if facts.nginx else ""))
    named = facts.conf.own("pid")
    path = named[-1].args[0] if named and named[-1].args else compiled.get("pid-path", _PID_PATH)
    path = os.path.join(compiled.get("prefix", "/"), path)
    pid = servers.read_pid(path)
    fits = pid is not None and facts.master is not None and pid == facts.master.pid
    return PidFile(path, pid, pid is not None and psutil.pid_exists(pid), fits)


def _master(pid: int) -> NginxMaster:
    workers = []
    try:
        master = psutil.Process(pid)
        for child in master.children():
            title = " ".join(child.cmdline())
            if title.startswith("nginx: worker process"):
                workers.append(NginxWorker(child.pid, child.create_time(), "is shutting down" in title))
        program = os.readlink(f"/proc/{pid}/exe")
    except (psutil.Error, OSError):
        program = ""  # it ended meanwhile, or is another user's
    return NginxMaster(pid, tuple(workers), program.endswith(" (deleted)"))


def _changed(paths: Iterable[str], master: NginxMaster) -> tuple[str, ...]:
    newest = max((worker.created for worker in master.workers if not worker.leaving), default=float("inf"))
    return tuple(path for path in paths if _written(path) > newest + _BOOT_PRECISION)


def _written(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0  # it was removed after it was read


def _machine(facts: Facts) -> Facts:
    nginx, api = facts.settings.nginx, facts.settings.api
    wanted = {
        nginx.control,
        os.path.dirname(nginx.control),
        os.path.dirname(nginx.snapshot),
        api.socket,
        api.token_file,
    }
    unseen = list(facts.unseen)
    paths = {}
    for path in sorted(filter(None, wanted)):
        try:
            paths[path] = _path(path)
        except OSError as error:
            unseen.append(Found(path, path, f"it cannot be looked at: {error.strerror}", "ask as root"))
    low, high = _numbers("/proc/sys/net/ipv4/ip_local_port_range") or (1, 0)
    return replace(
        facts,
        paths=paths,
        ephemeral=frozenset(range(low, high + 1)) - _reserved(),
        somaxconn=next(iter(_numbers("/proc/sys/net/core/somaxconn")), None),
        unseen=tuple(unseen),
    )


def _path(path: str) -> PathFact:
    real = Path(os.path.realpath(path))
    opened = all(each.stat().st_mode & 0o001 for each in real.parents if each.exists())
    try:
        mode = real.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return PathFact(path, None, opened)
    return PathFact(path, mode, opened, os.access(real, os.W_OK))


def _numbers(path: str) -> list[int]:
    try:
        return [int(number) for number in Path(path).read_text().split()]
    except OSError:  # a container may lack or hide it
        return []


def _reserved() -> set[int]:
    """The ports that net.ipv4.ip_local_reserved_ports keeps from outgoing connections."""
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_reserved_ports").read_text()
    except OSError:
        return set()
    parts = (part.partition("-") for part in text.strip().split(",") if part)
    return {port for low, _, high in parts for port in range(int(low), int(high or low) + 1)}
