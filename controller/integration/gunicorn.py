"""gunicorn's hooks: the master says when it comes and when it goes, and goes only when nginx has let go of it.

gunicorn.conf.py imports `configure` and ends with `configure(globals())`.
"""

from __future__ import annotations

import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from controller.integration import shutdown
from controller.integration.notice import SOCKET, Headgate, Unheard

_LAST = "guard"  # the API's error code where no other server of the upstream serves: there is nobody to refuse for
_booted = mmap.mmap(-1, 1)  # shared with the workers: whether one has loaded the application


@dataclass(frozen=True, slots=True)
class _Options:
    headgate: Headgate
    servers: tuple[str, ...]
    wait: float | None
    grace: float


def configure(
    namespace: MutableMapping[str, Any],
    *,
    headgate: str = SOCKET,
    server: str | Iterable[str] = (),
    upstream: str | None = None,
    wait: float | None = None,
    grace: float = 2.0,
) -> None:
    """Put the hooks into gunicorn.conf.py's `globals()`, after those that stand there already.

    `headgate` is the API's unix socket. `server` is this server's address as nginx.conf has it, or several; without it
    those of `bind`, a wildcard as 127.0.0.1. `upstream` None is every upstream that has the server. `wait` is how many
    seconds TERM waits until nginx has no request here (None: as long as `graceful_timeout`), `grace` for how many
    seconds the shutdown flag is set beforehand where Headgate does not hear.
    """
    servers = (server,) if isinstance(server, str) else tuple(server)
    options = _Options(Headgate(headgate, upstream), servers, wait, grace)

    def attach(arbiter: Any) -> None:
        if isinstance(master := getattr(arbiter, "headgate", None), _Master):
            master.options = options
        else:
            arbiter.headgate = _Master(arbiter, options)

    _add(namespace, "when_ready", attach)
    _add(namespace, "on_reload", attach)
    _add(namespace, "post_worker_init", _worker_has_booted)


def _add(namespace: MutableMapping[str, Any], name: str, hook: Callable[[Any], None]) -> None:
    before = namespace.get(name)

    def both(subject: Any) -> None:
        if before is not None:
            before(subject)
        hook(subject)

    namespace[name] = both


def _worker_has_booted(worker: Any) -> None:
    if not _booted[0]:
        _booted[0] = 1
        try:
            os.kill(worker.ppid, signal.SIGCHLD)  # wakes the master, which otherwise looks once a second
        except (PermissionError, ProcessLookupError) as error:
            worker.log.debug("headgate: this worker cannot wake its master: %s", error)


class _Master:
    """Stands in for two methods of gunicorn's arbiter. All but `_leave` runs in the arbiter's own loop."""

    def __init__(self, arbiter: Any, options: _Options) -> None:
        self.options = options
        self._arbiter = arbiter
        self._term, self._manage = arbiter.handle_term, arbiter.manage_workers
        arbiter.handle_term, arbiter.manage_workers = self._on_term, self._on_manage
        self._online = False
        self._leaving = False
        self._ready = False
        self._gone = threading.Event()

    def _on_manage(self) -> None:
        """What the arbiter does at least once a second."""
        self._manage()
        if self._shared():
            self._online = False  # whichever master stays says so when the other is gone
        elif _booted[0] and not self._online and not self._leaving:
            self._online = True
            for server in self._servers():
                try:
                    self.options.headgate.online(server)
                    self._arbiter.log.info("headgate: %s is online", server)
                except Unheard as unheard:
                    self._arbiter.log.warning("headgate: %s could not be announced: %s", server, unheard)

    def _on_term(self) -> None:
        """First leave, with the arbiter going on; at the second time, which `_leave` brings about, end."""
        if self._ready:
            self._gone.set()
            if not self._shared():
                shutdown.begin()
            self._term()
        elif self._leaving:
            self._arbiter.log.info("headgate: already waiting for nginx; INT or QUIT ends at once")
        else:
            self._leaving = True
            threading.Thread(target=self._leave, args=[self._servers()], daemon=True).start()

    def _leave(self, servers: Iterable[str]) -> None:
        try:
            told = [self._tell(server) for server in servers]
            if not any(told) and not self._shared():
                shutdown.begin()
                self._gone.wait(self.options.grace)
        finally:
            self._ready = True
            while not self._gone.is_set():  # gunicorn before 25 forgets signals when five are waiting
                os.kill(os.getpid(), signal.SIGTERM)
                self._gone.wait(1.0)

    def _tell(self, server: str) -> bool:
        """Say that this address goes, and wait; False where nobody took note of it."""
        log, wait = self._arbiter.log, self.options.wait
        if wait is None:
            wait = self._arbiter.cfg.graceful_timeout
        try:
            left = self.options.headgate.offline(server, wait, f"gunicorn master {os.getpid()} got TERM")
        except Unheard as unheard:
            log.warning("headgate: %s goes offline without Headgate: %s", server, unheard)
            return unheard.code == _LAST
        if left.empty:
            log.info("headgate: %s is offline, and empty after %.1f s", server, left.seconds)
        else:
            log.warning("headgate: %s is offline, but still has requests after %.1f s", server, left.seconds)
        return True

    def _shared(self) -> bool:
        """Whether another master has the same listeners (USR2), so that the server stays when this one goes."""
        return bool(self._arbiter.reexec_pid or self._arbiter.master_pid)

    def _servers(self) -> tuple[str, ...]:
        bound = [listener.getsockname() for listener in self._arbiter.LISTENERS]  # none with reuse_port
        return self.options.servers or tuple(map(_address, bound or self._arbiter.cfg.address))


def _address(bound: tuple[Any, ...] | str) -> str:
    """A bound address as nginx.conf would write it."""
    if isinstance(bound, str):
        return f"unix:{bound}"
    host, port = bound[:2]
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
