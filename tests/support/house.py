"""A whole daemon in a thread: the real runtime, store and API; the world around it (nginx, processes, probes) is held
in the test's hand."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from controller.adapters.edge import EdgeHost
from controller.adapters.store.sqlite import SqliteStore
from controller.api.serve import ApiServer
from controller.core.events import Event, ProbeResult
from controller.core.model import Master, Server, Upstream
from controller.core.policy import DrainPolicy, HealthPolicy, Policy, ProcessPolicy, RolloutPolicy, WarmUpPolicy
from controller.ports import (
    Check,
    ConfigError,
    Counters,
    NginxConfig,
    Parameter,
    PeerCounters,
    PlaneRefused,
    PlaneStatus,
    PlaneUnreachable,
    ProcessError,
    Target,
    Trial,
)
from controller.runtime import Runtime

T = TypeVar("T")

POLICY = Policy(
    health=HealthPolicy(rise=1, fall=1),
    warm_up=WarmUpPolicy(duration=0.0),
    drain=DrainPolicy(timeout=60.0, settle=0.0),
    rollout=RolloutPolicy(max_load=0.0),
    process=ProcessPolicy(start=("serve",), graceful_timeout=60.0),
)
APP = Upstream(
    "app", tuple(Server(f"127.0.0.1:{p}", f"127.0.0.1:{p}", "127.0.0.1", p) for p in (8001, 8002, 8003)), policy=POLICY
)
NAMED = Upstream(
    "named",
    (
        *(Server(f"web:80@10.0.0.{n}", "web:80", f"10.0.0.{n}", 80, weight=2) for n in (1, 2)),
        Server("unix:/run/a b.sock", "unix:/run/a b.sock", "unix:/run/a b.sock", 0, backup=True),
    ),
    policy=replace(POLICY, process=None),
)


class TestClock:
    """The machine's clocks."""

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    def boot(self) -> str:
        return "boot"


class HeldPlane:
    """nginx: serves what is published, unless `error` or `refuses`; `busy` are requests in flight by server key,
    `served` those that were answered beyond the first hundred."""

    def __init__(self) -> None:
        self.revision = 0
        self.error = ""
        self.refuses = ""
        self.busy: dict[str, int] = {}
        self.served: dict[str, int] = {}
        self.meant: dict[Parameter, str | None] = {}
        self._keys = {each.name: [server.key for server in each.servers] for each in (APP, NAMED)}
        self.asked = threading.Event()  # set whenever the counters of one upstream were read

    async def status(self) -> PlaneStatus:
        await self._answer()
        return PlaneStatus("nginx", self.revision)

    async def publish(self, table: Mapping[str, object]) -> PlaneStatus:
        await self._answer()
        if self.refuses:
            raise PlaneRefused("no_room", self.refuses, "make room", self.revision)
        self.revision = int(str(table["revision"]))
        upstreams: Any = table["upstreams"]
        self._keys = {name: [server["key"] for server in each["servers"]] for name, each in upstreams.items()}
        return PlaneStatus("nginx", self.revision)

    async def remembered(self) -> Mapping[str, Any] | None:
        return None

    async def mean(self, meant: Mapping[Parameter, str | None]) -> None:
        self.meant = dict(meant)

    async def load(self) -> None:
        await self._answer()

    async def counters(self, upstream: str | None = None) -> Counters:
        await self._answer()
        if upstream:
            self.asked.set()
        seen = {
            name: {key: self._counted(key) for key in keys}
            for name, keys in self._keys.items()
            if upstream in (None, name)
        }
        return Counters("nginx", self.revision, seen)

    def _counted(self, key: str) -> PeerCounters:
        more = self.served.get(key, 0)
        return PeerCounters(
            *(self.busy.get(key, 0), 100 + more, 2),
            answered=98 + more,
            errors=4,
            timeouts=1,
            seconds=2.45 + 0.01 * more,
            refused_marks=3,
        )

    async def close(self) -> None:
        pass

    async def _answer(self) -> None:
        await asyncio.sleep(0)  # I/O always lets others run
        if self.error:
            raise PlaneUnreachable(self.error, "start nginx")


class HeldProcesses:
    """Masters that come and go at once; `stuck` ones do not end before that is set. `started` has those that came."""

    def __init__(self) -> None:
        self.stuck = asyncio.Event()
        self.stuck.set()
        self.broken = ""
        self.started: list[str] = []

    async def find(self, upstream: str, server: Server, policy: ProcessPolicy) -> Master | None:
        return Master(1000 + server.port, 1.0, "/usr/bin/python3", ((1, 1.0),))

    async def terminate(self, master: Master, policy: ProcessPolicy) -> None:
        pass

    async def unreplaced(self, upstream: str, server: Server, master: Master, policy: ProcessPolicy) -> None:
        pass

    async def wait_exit(self, master: Master, timeout: float) -> bool:
        await self.stuck.wait()
        return True

    async def kill(self, master: Master, policy: ProcessPolicy) -> tuple[int, ...]:
        return ()

    async def start(self, upstream: str, server: Server, policy: ProcessPolicy, mark: str) -> Master:
        if self.broken:
            raise ProcessError(self.broken, "mend it")
        self.started.append(server.key)
        return Master(2000 + server.port, 2.0, "/usr/bin/python3", ((2, 2.0),))

    async def ended(self, master: Master, timeout: float) -> bool:
        return False

    async def reload(self, master: Master) -> Master:
        return master

    async def renewed(self, master: Master, policy: ProcessPolicy) -> Master:
        return replace(master, workers=((3, 3.0),))

    async def upgrade(self, server: Server, master: Master, policy: ProcessPolicy, trial: Trial) -> Master:
        return replace(master, pid=master.pid + 1000)

    async def scale(self, master: Master, workers: int, policy: ProcessPolicy) -> Master:
        return replace(master, workers=tuple((n, 4.0) for n in range(workers)))

    async def run(
        self, command: Sequence[str], upstream: str, server: Server, policy: ProcessPolicy, mark: str
    ) -> None:
        pass


class HeldProber:
    """Every probe passes at once, but those of servers in `down`."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._known: set[tuple[str, str]] = set()
        self.down: set[str] = set()

    def set_targets(self, targets: Mapping[tuple[str, str], Target]) -> None:
        for target in targets.keys() - self._known:
            self.probe_now(*target)
        self._known = set(targets)

    def probe_now(self, upstream: str, server: str) -> None:
        ok = server not in self.down
        self._emit(ProbeResult(upstream, server, ok, "ok" if ok else "refused"))

    async def close(self) -> None:
        pass


class HeldEdge(EdgeHost):
    """This host; `connected` clients hold connections to nginx."""

    def __init__(self, mark: Path) -> None:
        super().__init__(mark, "")
        self.connected = 0

    async def clients(self) -> int:
        return self.connected


class HeldSource:
    """nginx.conf as the test says; it cannot be read while `error` says why."""

    def __init__(self) -> None:
        self.config = NginxConfig((APP, NAMED), unhooked=("legacy",), warnings=("/etc/nginx/nginx.conf:3: odd",))
        self.error = ""

    async def read(self) -> NginxConfig:
        if self.error:
            raise ConfigError(self.error, "mend it")
        return self.config

    def remember(self, addresses: Mapping[str, tuple[str, ...]]) -> None:
        pass

    async def resolve_again(self) -> NginxConfig | None:
        return None


class HeldMembers:
    """The `server` lines of the upstream `app`, in the very configuration that is read; `error` keeps it as it is."""

    def __init__(self, source: HeldSource) -> None:
        self._source = source
        self.error = ""

    async def check(self, upstream: str, adding: Sequence[str], removing: Sequence[str], weight: int) -> None:
        if self.error:
            raise ConfigError(self.error, "mend it")

    async def add(self, upstream: str, address: str, weight: int) -> str:
        host, port = address.rsplit(":", 1)
        self._have(lambda servers: (*servers, Server(address, address, host, int(port), weight)))
        return "added"

    async def remove(self, upstream: str, address: str) -> str:
        self._have(lambda servers: tuple(server for server in servers if server.key != address))
        return "taken out"

    def _have(self, edit: Callable[[tuple[Server, ...]], tuple[Server, ...]]) -> None:
        if self.error:
            raise ConfigError(self.error, "mend it")
        app, *others = self._source.config.upstreams
        app = replace(app, servers=edit(app.servers))
        self._source.config = replace(self._source.config, upstreams=(app, *others))


class House:
    """Started by `with`; the API is at `socket`, and at `http://` + `api.address` where `listen` is given."""

    def __init__(
        self,
        directory: Path,
        listen: str | None = None,
        token: str | None = None,
        readiness: str | None = None,
        warm: bool = False,
        keep_events: int = 50_000,
    ) -> None:
        self.directory = directory
        self.socket = directory / "run" / "api.sock"
        self._served = (listen, token, readiness, warm)
        self._keep_events = keep_events
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="house")

    def __enter__(self) -> House:
        self._thread.start()
        try:
            self.call(self._start())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call(self._stop())
        finally:
            self._end()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run this on the daemon's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def do(self, work: Callable[[], T]) -> T:
        """Call this on the daemon's loop and wait for it."""

        async def inside() -> T:
            return work()

        return self.call(inside())

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until this holds of the runtime."""

        async def inside() -> None:
            async with asyncio.timeout(20):
                while not holds():
                    await self.runtime.changed(self.runtime.version, 0.5)

        self.call(inside())

    async def _start(self) -> None:
        self.plane, self.processes, self.source = HeldPlane(), HeldProcesses(), HeldSource()
        self.members = HeldMembers(self.source)
        self.edge = HeldEdge(self.directory / "edge-offline")

        def prober(emit: Callable[[Event], None]) -> HeldProber:
            self.prober = HeldProber(emit)
            return self.prober

        self.runtime = Runtime(
            clock=TestClock(),
            plane=self.plane,
            processes=self.processes,
            prober=prober,
            source=self.source,
            members=self.members,
            store=SqliteStore(f"sqlite:///{self.directory}/state.db", self._keep_events),
            edge=self.edge,
            check_for=lambda _: Check(),
        )
        await self.runtime.start()
        self.api = ApiServer(self.runtime, self.socket, *self._served)
        await self.api.start()
        while not self.settled():
            await self.runtime.changed(self.runtime.version, 0.5)

    def settled(self) -> bool:
        """Every server is up, and nginx serves it so."""
        state = self.runtime.state
        up = all(peer.health == "up" for group in state.groups.values() for peer in group.peers.values())
        return bool(state.groups) and up and self.published()

    def published(self) -> bool:
        """nginx serves what the state says."""
        state = self.runtime.state
        return not state.plane.error and state.plane.revision == state.revision

    def refuse_writes(self, refused: bool = True) -> None:
        """From now on every write to the store fails, as on a read-only file system; or it does not any more."""
        store = self.runtime.store
        assert isinstance(store, SqliteStore)
        self.call(store._run(lambda db: db.execute(f"PRAGMA query_only = {int(refused)}")))

    def until_connections(self, count: int) -> None:
        """Wait until so many requests are under way at the API."""
        self.until(lambda: sum(len(server.server_state.tasks) for server in self.api.servers) >= count)

    def tasks(self) -> int:
        """How many tasks the daemon has."""
        return self.do(self.count_tasks)

    def count_tasks(self) -> int:
        """The same, called on the daemon's loop."""
        return len(asyncio.all_tasks())

    async def _stop(self) -> None:
        await self.api.stop()
        await self.runtime.close()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
