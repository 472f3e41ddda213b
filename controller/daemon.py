"""The composition root: builds every part from the settings, owns signals and what systemd is told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from controller import adopt
from controller.adapters.clock import SystemClock
from controller.adapters.edge import EdgeHost
from controller.adapters.nginx.files import DiskReader, NginxFiles
from controller.adapters.nginx.lua import LuaPlane
from controller.adapters.nginx.members import NginxMembers
from controller.adapters.nginx.reload import ReloadPlane
from controller.adapters.nginx.verify import Reloader
from controller.adapters.nginx.writer import ConfWriter
from controller.adapters.notify import Notifier
from controller.adapters.probe import NetProber
from controller.adapters.process import Processes
from controller.adapters.store.sqlite import SqliteStore
from controller.adapters.watch import Watcher
from controller.api.serve import ApiServer, read_token
from controller.core.policy import Policy
from controller.errors import HeadgateError, SettingsError
from controller.ports import Check, Clock, DataPlane
from controller.runtime import Runtime
from controller.settings import DEFAULT_FILE, Settings, load

log = structlog.get_logger("headgate")


def run(file: str | None) -> int:
    """Run the daemon with the settings of `file` until SIGTERM or SIGINT; the exit status. SettingsError.

    SIGHUP reads settings and nginx.conf again. When the daemon ends, traffic stays exactly as it is, and changes that
    are under way go on in the next life.
    """
    path = os.path.abspath(file or os.environ.get("HEADGATE_CONFIG") or DEFAULT_FILE)
    version = DiskReader().digest(path)
    settings = load(file)
    configure_logs(settings)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a thousand first probes start at once
    return asyncio.run(_Daemon(file, settings, {path: version}).live())


def configure_logs(settings: Settings) -> None:
    """Structured lines on stderr, for people or as JSON."""
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if settings.log.format == "console"
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _without_empty,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.log.level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _without_empty(_: object, __: str, line: structlog.types.EventDict) -> structlog.types.EventDict:
    return {key: value for key, value in line.items() if value != ""}


@dataclass(slots=True)
class _Policies:
    """What headgate.toml says of each upstream; replaced as a whole when it is read again."""

    settings: Settings

    def policy_for(self, upstream: str) -> Policy:
        return self.settings.policy_for(upstream)

    def check_for(self, upstream: str) -> Check:
        return self.settings.check_for(upstream)


class _Daemon:
    def __init__(self, file: str | None, settings: Settings, version: dict[str, str]) -> None:
        self._file = file
        self._version = version
        self._settings = settings
        self._policies = _Policies(settings)
        self._notifier = Notifier()
        self._pinged = 0.0

    async def live(self) -> int:
        settings, clock = self._settings, SystemClock()
        store = SqliteStore(**settings.store.model_dump())
        watcher = Watcher(lambda paths: self._changed(runtime, paths), self._version)
        writer = adopt.writer(settings, watcher.announce)
        plane, source = _data_plane(settings, self._policies, clock, watcher, writer)
        runtime = Runtime(
            clock=clock,
            plane=plane,
            processes=Processes(),
            prober=NetProber,
            source=source,
            members=NginxMembers(settings.nginx.conf, writer),
            store=store,
            edge=EdgeHost(settings.edge_mark, settings.nginx.conf),
            check_for=self._policies.check_for,
            resolve_interval=settings.nginx.resolve_interval,
            data_plane=settings.nginx.data_plane,
            on_turn=lambda: self._ping(clock.now()),
        )
        token = read_token(Path(settings.api.token_file)) if settings.api.token_file else None
        ready = settings.readiness
        api = ApiServer(
            runtime, Path(settings.api.socket), settings.api.listen or None, token, ready.listen or None, ready.warm
        )
        stop = asyncio.Event()
        with _signals(
            {signal.SIGTERM: stop.set, signal.SIGINT: stop.set, signal.SIGHUP: lambda: self._reload(runtime)}
        ):
            try:
                await api.start()
                for sentence in await adopt.recover(settings):
                    log.warning(sentence)
                await runtime.start()
                watcher.start()
            except HeadgateError as error:
                log.error("headgate cannot start", error=error.message, remedy=error.remedy)
                await api.stop()
                await runtime.close()
                return 1
            tcp = f" and http://{api.address}" if api.address else ""
            log.info(f"headgate runs; its API is at {settings.api.socket}{tcp}")
            if api.readiness_address:
                log.info(f"readiness is answered at http://{api.readiness_address}")
            self._notifier.ready("serving")
            ended = [asyncio.ensure_future(event.wait()) for event in (stop, runtime.failed)]
            await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
            for waiting in ended:
                waiting.cancel()
            self._notifier.stopping()
            await watcher.close()
            await api.stop()
            await runtime.close()
        log.info("headgate has ended; traffic stays as it is")
        return 1 if runtime.failed.is_set() else 0

    def _ping(self, now: float) -> None:
        """Tell the watchdog, from the turn of the deciding task itself, that the work is alive."""
        if self._notifier.watchdog and now - self._pinged >= self._notifier.watchdog / 3:
            self._pinged = now
            self._notifier.ping()

    def _changed(self, runtime: Runtime, paths: frozenset[str]) -> None:
        """Files on disk are other than what we know."""
        log.info("files have changed", paths=sorted(paths))
        if not paths.isdisjoint(self._version):
            self._reload(runtime)
        else:
            self._rereading = asyncio.ensure_future(runtime.reread())

    def _reload(self, runtime: Runtime) -> None:
        self._notifier.reloading()
        try:
            self._policies.settings = load(self._file)
            log.info("settings were read again; what concerns sockets, paths and the store needs a restart")
        except SettingsError as error:
            log.error("the old settings stay", error=error.message, remedy=error.remedy)
        reading = asyncio.ensure_future(runtime.reread())
        reading.add_done_callback(lambda _: self._notifier.ready("serving"))
        self._rereading = reading  # a task that nobody holds may vanish


def _data_plane(
    settings: Settings, policies: _Policies, clock: Clock, watcher: Watcher, writer: ConfWriter
) -> tuple[DataPlane, NginxFiles]:
    """Where tables go, and how nginx.conf is read for it.

    On the Lua plane an upstream is managed that has our hook. The reload plane needs no hook: there the upstreams are
    managed that headgate.toml names.
    """
    nginx = settings.nginx
    if nginx.data_plane == "lua":
        plane = LuaPlane(Path(nginx.control), Path(nginx.snapshot))
        return plane, NginxFiles(nginx.conf, policies.policy_for, on_read=watcher.follow)

    reloader = Reloader(
        Path(nginx.conf), Path(nginx.version_socket), Path(nginx.version_file), announce=watcher.announce
    )
    reloads = ReloadPlane(Path(nginx.conf), settings.nginx_state, writer, reloader, clock)
    return reloads, NginxFiles(
        nginx.conf,
        policies.policy_for,
        on_read=watcher.follow,
        managed=lambda block: block.name in policies.settings.upstream,
        meant=reloads.without_ours,
    )


@contextlib.contextmanager
def _signals(handlers: dict[signal.Signals, Callable[[], None]]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
