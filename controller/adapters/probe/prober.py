"""The rhythm of many probes, and what is told of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping

import structlog

from controller.adapters.probe import agent, grpc, http
from controller.adapters.probe.common import Endpoint, connect, reason_of
from controller.core.events import AgentSaid, ProbeResult
from controller.core.model import Server
from controller.ports import Check, Pace, Target

GRID = (0.05, 0.2)
"""Seconds to which probes are aligned, at least and at most; between these it is what their jitter allows.

Woken together they cost a fraction of what they cost one by one: a daemon that sleeps between probes is cold each time.
"""

_log = structlog.get_logger(__name__)
_Key = tuple[str, str, bool]  # upstream, server, and whether it is the agent that is asked beside the check


class NetProber:
    """Fulfils ports.Prober. `emit` is called on the event loop, with a ProbeResult for each probe that ran to its end,
    and with AgentSaid when an agent answers for the first time or in other words than before.

    A probe that we cut short (`set_targets`, `probe_now`, `close`), or that we lack file descriptors, memory or files
    for, says nothing about the server and is not emitted. Neither is an agent that does not answer beside the check.
    """

    def __init__(self, emit: Callable[[ProbeResult | AgentSaid], None]) -> None:
        self._emit = emit
        self._targets: dict[tuple[str, str], Target] = {}
        self._watches: dict[_Key, _Watch] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def set_targets(self, targets: Mapping[tuple[str, str], Target]) -> None:
        """Probe exactly these, by (upstream, server key). Unchanged ones keep their rhythm; new ones start at once.

        Another pace shortens the wait for the next probe at once, and never cancels one that is under way.
        """
        before, self._targets = self._targets, dict(targets)
        for upstream, server in before.keys() - targets.keys():
            self._stop((upstream, server, False))
            self._stop((upstream, server, True))
        for key, target in targets.items():
            if before.get(key) != target:
                self._aim((*key, False), target.server, target.check, target.pace)
                self._aim((*key, True), target.server, target.check.agent, target.pace)

    def probe_now(self, upstream: str, server: str) -> None:
        """Drop a probe under way, if any, and probe this target at once."""
        for beside in (False, True):
            if watch := self._watches.get((upstream, server, beside)):
                self._start((upstream, server, beside), watch.endpoint, watch.pace)

    async def close(self) -> None:
        """Cancel everything and wait for it."""
        self.set_targets({})
        await asyncio.gather(*self._ending, return_exceptions=True)

    def _aim(self, key: _Key, server: Server, check: Check | None, pace: Pace) -> None:
        if check is None:
            self._stop(key)
            return
        endpoint, watch = Endpoint.of(server, check), self._watches.get(key)
        if watch and watch.endpoint == endpoint:
            watch.keep(pace)
        else:
            self._start(key, endpoint, pace)

    def _start(self, key: _Key, endpoint: Endpoint, pace: Pace) -> None:
        self._stop(key)
        watch = self._watches[key] = _Watch(endpoint, pace)
        watch.task = asyncio.get_running_loop().create_task(self._run(key, watch))

    def _stop(self, key: _Key) -> None:
        if (watch := self._watches.pop(key, None)) and watch.task:
            watch.task.cancel()
            self._ending.add(watch.task)
            watch.task.add_done_callback(self._ending.discard)

    async def _run(self, key: _Key, watch: _Watch) -> None:
        loop = asyncio.get_running_loop()
        check = watch.endpoint.check
        while True:
            watch.began = loop.time()
            reason = "ok"
            try:
                async with asyncio.timeout(check.timeout):
                    detail = await ask(watch.endpoint)
            except Exception as error:  # noqa: BLE001 - whatever a server does to its client is the server's failure
                reason, detail = reason_of(error, check)
            self._tell(key, watch, reason, detail, loop.time() - watch.began)
            await watch.pause()

    def _tell(self, key: _Key, watch: _Watch, reason: str, detail: str, seconds: float) -> None:
        upstream, server, beside = key
        unheard = reason == "ours" or (beside and reason != "ok")
        if unheard != watch.unheard:  # said once, not at each probe
            watch.unheard = unheard
            who = "agent" if beside else "probe"
            if unheard:
                _log.warning(f"no word from a {who}", upstream=upstream, server=server, reason=reason, error=detail)
            else:
                _log.info(f"word from a {who} again", upstream=upstream, server=server)
        if unheard:
            return
        if watch.endpoint.check.type == "agent" and reason == "ok":
            if detail != watch.words:
                watch.words = detail
                self._emit(AgentSaid(upstream, server, detail))
            reason, detail = agent.verdict(detail)
        if not beside:
            self._emit(ProbeResult(upstream, server, reason == "ok", reason, detail, seconds))


async def ask(endpoint: Endpoint) -> str:
    """Probe once: what the server said; an exception where it failed, which `reason_of` understands."""
    match endpoint.check:
        case Check(type="http", body=None):
            return await http.probe(endpoint)
        case Check(type="tcp"):
            (await connect(endpoint)).close()
            return "connected"
        case Check(type="grpc" | "grpcs"):
            return await grpc.probe(endpoint)
        case Check(type="agent"):
            return await agent.ask(endpoint)
    return await http.probe_body(endpoint)


class _Watch:
    """The rhythm of one check of one server."""

    def __init__(self, endpoint: Endpoint, pace: Pace) -> None:
        self.endpoint = endpoint
        self.pace = pace
        self.task: asyncio.Task[None] | None = None
        self.began = 0.0
        self.words = ""
        self.unheard = False
        self._part = random.random()  # the second probe comes early, by chance, so that those of one start spread out
        self._waiting: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def keep(self, pace: Pace) -> None:
        """Go on at this pace; a wait that is too long for it is shortened."""
        before, self.pace = self._interval, pace
        if self._waiting and self._interval < before:
            self._arm()

    async def pause(self) -> None:
        """Wait until the next probe is due."""
        self._waiting = asyncio.get_running_loop().create_future()
        try:
            self._arm()
            await self._waiting
        finally:
            self._waiting = None
            if self._timer:
                self._timer.cancel()
            self._timer = None
        self._part = 1.0

    @property
    def _interval(self) -> float:
        check = self.endpoint.check
        faster = {Pace.FAST: check.fast_interval, Pace.DOWN: check.down_interval}
        return faster.get(self.pace) or check.interval

    def _arm(self) -> None:
        interval, jitter = self._interval, self.endpoint.check.jitter
        grid = min(max(GRID[0], interval * jitter), GRID[1])
        due = self.began + self._part * interval * (1 + random.uniform(-jitter, jitter))
        due = round(due / grid) * grid
        if self._timer:
            due = min(due, self._timer.when())
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due, self._wake)

    def _wake(self) -> None:
        if self._waiting and not self._waiting.done():
            self._waiting.set_result(None)
