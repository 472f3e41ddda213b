"""nginx's own configuration files to the upstreams that Headgate manages: addresses resolved, policies joined."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from controller.conf.index import Look
from controller.conf.parse import (
    Cache,
    ConfSyntaxError,
    ServerLine,
    Tree,
    UpstreamBlock,
    digest,
    parse,
    shown,
    unspeakable,
)
from controller.core.model import Place, Server, Upstream
from controller.core.policy import BalancePolicy, Policy, StickyPolicy
from controller.core.table import places
from controller.ports import ConfigError, NginxConfig

LOOKUP_TIMEOUT = 5.0
"""Seconds until a host name counts as not resolving for now; the look-up itself goes on and is used when it ends."""


SETTLED = 2.0
"""Seconds for which a file must have been left alone before its stamp is trusted: two writes may have the same time."""


class _Glob(ctypes.Structure):
    """glob_t of glob.h, of which the first two fields are read; the rest differs between C libraries."""

    _fields_ = (
        ("count", ctypes.c_size_t),
        ("paths", ctypes.POINTER(ctypes.c_char_p)),
        ("rest", ctypes.c_byte * 128),
    )


_libc = ctypes.CDLL(None)


class DiskReader:
    """Files of this machine, for `controller.conf`; for one reading of a configuration."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}
        self._now = time.time()

    def read(self, path: str) -> bytes:
        """The whole file; OSError."""
        return Path(path).read_bytes()

    def glob(self, pattern: str) -> Sequence[str]:
        """What glob(3) finds, which nginx asks without flags, sorted by bytes."""
        found = _Glob()
        try:
            if _libc.glob(os.fsencode(pattern), 0, None, ctypes.byref(found)):
                return []
            return sorted(map(os.fsdecode, found.paths[: found.count]), key=os.fsencode)
        finally:
            _libc.globfree(ctypes.byref(found))

    def look(self, path: str) -> Look:
        """Where a file really is, and a stamp of device, inode, size and times."""
        folder, _, name = path.rpartition("/")  # os.path's functions would take half of the time that edits may take
        known = self._folders.get(folder)
        if known is None:
            root = "/" if path.startswith("/") else "."
            known = self._folders[folder] = os.path.realpath(folder or root).rstrip("/")
        real = f"{known}/{name}"
        try:
            found = os.lstat(real)
            if stat.S_ISLNK(found.st_mode):
                real = os.path.realpath(real)
                found = os.stat(real)
        except OSError:
            return Look(real, None)
        if self._now - found.st_ctime <= SETTLED:
            return Look(real, None)
        return Look(real, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))

    def digest(self, path: str) -> str:
        """The digest of a file's content, empty where it cannot be read."""
        try:
            return digest(self.read(path))
        except OSError:
            return ""


class _Witness(DiskReader):
    """Remembers what was read, and what was not there: the outcome of parsing depends on nothing else."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.globs: dict[str, tuple[str, ...]] = {}

    def read(self, path: str) -> bytes:
        self.files[path] = ""
        content = super().read(path)
        self.files[path] = digest(content)
        return content

    def glob(self, pattern: str) -> Sequence[str]:
        self.globs[pattern] = tuple(super().glob(pattern))
        return self.globs[pattern]


async def lookup(host: str) -> tuple[str, ...]:
    """All IPv4 and IPv6 addresses of a host name that this machine can use, sorted; OSError. As nginx resolves.

    It has a thread of its own: in the loop's few, those that wait for a dead name server would keep tables from nginx.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[tuple[str, ...]] = loop.create_future()

    def resolve(found: tuple[str, ...], error: Exception | None) -> None:
        if not answer.done():
            answer.set_exception(error) if error else answer.set_result(found)

    def look() -> None:
        found: tuple[str, ...] = ()
        failure: Exception | None = None
        try:
            every = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
            found = tuple(sorted({str(address[0]) for *_, address in every}))
        except (OSError, UnicodeError) as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile, and nobody waits
            loop.call_soon_threadsafe(resolve, found, failure)

    threading.Thread(target=look, name=f"lookup {host}", daemon=True).start()
    return await answer


class NginxFiles:
    """Fulfils ports.ConfigSource for the configuration at `conf`.

    Everything that keeps an upstream from being managed, or a name from being followed, is a sentence in `warnings`;
    nginx then goes on balancing that upstream by itself.

    `on_read` is told after each reading, a failed one too, what the outcome rests on: every file with the digest of its
    content (empty where it could not be read), and every include pattern with what it matched.

    `managed` says which upstreams are ours (those with our hook, on the Lua plane); `meant` gives back the
    configuration as its author means it, without what a plane of ours has written into it.
    """

    def __init__(
        self,
        conf: str,
        policy_for: Callable[[str], Policy],
        *,
        lookup: Callable[[str], Awaitable[tuple[str, ...]]] = lookup,
        lookup_timeout: float = LOOKUP_TIMEOUT,
        on_read: Callable[[Mapping[str, str], Mapping[str, tuple[str, ...]]], None] = lambda files, globs: None,
        managed: Callable[[UpstreamBlock], bool] = lambda block: block.hooked,
        meant: Callable[[Tree], Tree] = lambda tree: tree,
    ) -> None:
        self._conf = conf
        self._policy_for = policy_for
        self._lookup = lookup
        self._timeout = lookup_timeout
        self._on_read = on_read
        self._managed = managed
        self._meant = meant
        self._cache = Cache()
        self._lock = asyncio.Lock()
        self._tree: Tree | None = None
        self._config: NginxConfig | None = None
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._failures: dict[str, str] = {}
        self._pending: dict[str, asyncio.Future[tuple[str, ...]]] = {}

    @property
    def parsed(self) -> int:
        """How many files were parsed until now; a file whose content is the same as before is not parsed again."""
        return self._cache.parsed

    def remember(self, addresses: Mapping[str, tuple[str, ...]]) -> None:
        """Last addresses of host names from an earlier life, by the address of their `server` line as written."""
        for written, ips in addresses.items():
            self._addresses.setdefault(written.partition(":")[0], ips)

    async def read(self) -> NginxConfig:
        """Parse the files in a thread and resolve host names; ConfigError.

        A name that does not resolve keeps its last addresses. One that never did is an error where it is new in an
        upstream that is managed: nginx would refuse that configuration, too. Else that upstream is left to nginx.
        """
        async with self._lock:
            reader = _Witness()
            try:
                tree = await asyncio.to_thread(lambda: self._meant(parse(self._conf, reader, self._cache)))
            except ConfSyntaxError as error:
                raise ConfigError(str(error), "correct it and see what `nginx -t` says") from error
            finally:
                self._on_read(reader.files, reader.globs)
            self._tree = tree
            self._config = await self._resolved(tree)
            return self._config

    async def resolve_again(self) -> NginxConfig | None:
        """Look the host names up again, without parsing; None when nothing has changed or nothing was read yet."""
        async with self._lock:
            if self._tree is None or not self._names(self._tree):
                return None
            try:
                config = await self._resolved(self._tree)
            except ConfigError:
                return None  # as it was
            if config == self._config:
                return None
            self._config = config
            return config

    async def _resolved(self, tree: Tree) -> NginxConfig:
        await self._resolve(self._names(tree))
        upstreams, warnings = [], []
        before = {upstream.name for upstream in self._config.upstreams} if self._config else set()
        for block in tree.upstreams:
            managed = self._managed(block)
            obstacle = block.obstacle or (managed and next(map(shown, unspeakable(block.name, block.servers)), ""))
            if obstacle:
                warnings.append(f"{obstacle} (not managed)")
            if not managed or obstacle:
                continue
            lines, notes = _merged(block)
            warnings += notes
            missing = False
            for line in lines:
                if error := self._failures.get(line.host):
                    last = self._addresses.get(line.host)
                    if not last and block.name in before:
                        message = f"{line.place}: {line.host} does not resolve ({error})"
                        raise ConfigError(message, "correct the name, or see to it that it resolves")
                    outcome = f"going on with {', '.join(last)}" if last else f"{block.name} is left to nginx"
                    warnings.append(f"{line.place}: {line.host} does not resolve ({error}); {outcome}")
                    missing |= not last
            if not missing:
                servers = tuple(server for line in lines for server in self._servers(line))
                upstreams.append(self._upstream(block, servers))
        unhooked = tuple(shown(block.name) for block in tree.upstreams if not self._managed(block))
        return NginxConfig(tuple(upstreams), unhooked, tree.files, tuple(dict.fromkeys(warnings)))

    def _upstream(self, block: UpstreamBlock, servers: tuple[Server, ...]) -> Upstream:
        policy = self._policy_for(block.name)
        if not block.hooked:
            policy = replace(policy, balance=BalancePolicy(), sticky=StickyPolicy())
        hashed = block.method == "hash"
        upstream = Upstream(
            block.name,
            servers,
            block.method,
            policy,
            Place(*block.place),
            hash_key=block.method_args[0] if hashed else "",
            consistent=hashed and "consistent" in block.method_args[1:],
            two=block.method == "random" and "two" in block.method_args,
        )
        if not places(upstream):
            return upstream
        return replace(upstream, policy=replace(policy, warm_up=replace(policy.warm_up, duration=0.0)))

    def _names(self, tree: Tree) -> set[str]:
        managed = (block for block in tree.upstreams if self._managed(block) and not block.obstacle)
        return {line.host for block in managed for line in block.servers if _is_name(line)}

    async def _resolve(self, names: Iterable[str]) -> None:
        """Bring `_addresses` and `_failures` up to date. A look-up that takes too long is not started a second time."""
        names = set(names)
        for name in names - self._pending.keys():
            self._pending[name] = asyncio.ensure_future(self._lookup(name))
        if names:
            await asyncio.wait([self._pending[name] for name in names], timeout=self._timeout)
        self._failures = {}
        for name in names:
            if not self._pending[name].done():
                self._failures[name] = f"no answer within {self._timeout:g} s"
                continue
            try:
                self._addresses[name] = self._pending.pop(name).result()
            except (OSError, UnicodeError) as error:
                self._failures[name] = getattr(error, "strerror", None) or str(error)

    def _servers(self, line: ServerLine) -> list[Server]:
        first = Server(
            key=line.address,
            address=line.address,
            ip=f"unix:{line.unix}" if line.unix else line.host,
            port=line.port,
            weight=line.weight,
            backup=line.backup,
            down=line.down,
            max_conns=line.max_conns,
            place=Place(*line.place),
        )
        if not _is_name(line):
            return [first]
        return [replace(first, key=f"{line.address}@{ip}", ip=ip) for ip in self._addresses[line.host]]


def _is_name(line: ServerLine) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, line.host)
        except OSError:
            continue
        return False
    return bool(line.host)


def _merged(block: UpstreamBlock) -> tuple[list[ServerLine], list[str]]:
    """The lines of an upstream with those of one address joined, for a server is drained as a whole.

    nginx takes two equal lines for two peers; one with the sum of weights gets the same share. Lines that take no
    part (`down`, and `backup` beside a primary) add nothing.
    """
    by_address: dict[tuple[str, int, str], list[ServerLine]] = {}
    for line in block.servers:
        by_address.setdefault((line.host.lower(), line.port, line.unix), []).append(line)
    lines, notes = [], []
    for same in by_address.values():
        serving = [line for line in same if not line.down] or same
        serving = [line for line in serving if not line.backup] or serving
        conns = [line.max_conns for line in serving]
        weight = sum(line.weight for line in serving)
        lines.append(replace(serving[0], weight=weight, max_conns=sum(conns) if all(conns) else 0))
        if len(same) > 1:
            places = " and ".join(str(line.place) for line in same)
            notes.append(f"{places}: {same[0].address} stands {len(same)} times in {block.name}; taken as one")
    return lines, notes
