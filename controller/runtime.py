"""One task owns the State: it takes events, asks the core, stores what changed, and only then acts.

What belongs here: the order of deciding, storing and acting, and the loops that turn the world into events.
What to do is decided in controller/core; how it is done stands in controller/adapters.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from controller.core import change, peers, recall
from controller.core.events import (
    AdminWished,
    ChangeWished,
    ConfigFailed,
    ConfigRead,
    ConsumersTold,
    EdgeTold,
    Effect,
    Event,
    Note,
    OfflineNoticed,
    OnlineNoticed,
    Outcome,
    ProbeNow,
    Restored,
    RunStep,
    SteerWished,
    StepFailed,
    TellConsumers,
    Ticked,
    WarmUpWished,
)
from controller.core.model import Admin, Health, Peer, Refused, State
from controller.core.step import step
from controller.core.steps import EDITS
from controller.errors import HeadgateError
from controller.follow import Follower
from controller.ports import (
    ChangeRecord,
    Check,
    Clock,
    ConfigError,
    ConfigSource,
    Counters,
    DataPlane,
    Edge,
    EventRecord,
    Members,
    NginxConfig,
    Pace,
    Parameter,
    PlaneRefused,
    PlaneUnreachable,
    Prober,
    ProcessControl,
    Saved,
    Store,
    StoreError,
    Target,
    TrafficRecord,
)
from controller.record import between, judged
from controller.stages import carry_out, edit, tell

log = structlog.get_logger("headgate")

Wish = AdminWished | ChangeWished | SteerWished | OfflineNoticed | OnlineNoticed | WarmUpWished

IDLE = 1.0  # seconds between two ticks while nothing is going on
BUSY = 0.1  # seconds between two ticks while a change runs
NOTES = 10_000  # events that are kept for recording while the store cannot be written
FLUSH = 5.0  # seconds between two writes of what the servers got, and of a running change at the longest
STALLED = 5.0  # seconds without a turn of the task after which it counts as stuck


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """An event, and whoever waits for its outcome."""

    event: Event
    answer: asyncio.Future[Outcome] | None = None

    def resolve(self, outcome: Outcome | Exception) -> None:
        """Give the outcome to whoever still waits for it."""
        if self.answer is None or self.answer.done():
            return
        if isinstance(outcome, Exception):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)


class Runtime:
    """Headgate's life between `start` and `close`.

    `state`, `counters`, `config` and `version` may be read at any time on the loop; only the task in here writes them.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        plane: DataPlane,
        processes: ProcessControl,
        prober: Callable[[Callable[[Event], None]], Prober],
        source: ConfigSource,
        members: Members,
        store: Store,
        edge: Edge,
        check_for: Callable[[str], Check],
        resolve_interval: float = 10.0,
        data_plane: str = "lua",
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        self.state = State()
        self.config: NginxConfig | None = None
        self.version = 0
        self.clock = clock
        self.store = store
        self.data_plane = data_plane
        self.store_error = ""
        self._edge = edge
        self._telling_edge = asyncio.Lock()
        self._plane = plane
        self._follower = Follower(self, plane)
        self._processes = processes
        self._prober = prober(self.post)
        self._source = source
        self.members = members
        self.check_for = check_for
        self._resolve_interval = resolve_interval
        self._on_turn = on_turn
        self._queue: asyncio.Queue[_Asked] = asyncio.Queue()
        self._turned = clock.now()
        self._changed = asyncio.Event()
        self._recorded = asyncio.Event()
        self._stored, self._stored_at = State(), 0.0
        self._notes: list[Note] = []  # not recorded yet
        self._held: list[Effect] = []  # not carried out yet, since they are not recorded
        self._tasks: set[asyncio.Task[None]] = set()
        self.failed = asyncio.Event()  # a task of ours has a defect: the daemon must end, and be started anew
        self._ticker: asyncio.TimerHandle | None = None
        self._tick_at = 0.0

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read store and configuration, look at nginx, and set everything going; StoreError.

        A configuration that cannot be read is no reason not to start: it is shown, and taken up when it is mended.
        """
        saved, offline = await self.store.load(), await self._edge.offline()
        if saved.lost:
            self._notes.append(Note("store", saved.lost))
        known = await self._remembered()
        self._source.remember(recall.addresses(known))
        if saved.now == 0:
            saved = self._recall(known)
        now = self.clock.now()
        self.state, _ = step(
            self.state,
            Restored(
                saved.revision,
                saved.next_change,
                saved.next_epoch,
                saved.peers,
                saved.changes,
                away=now - saved.now,
                rebooted=saved.boot != self.clock.boot(),
            ),
            now,
        )
        self._stored = self.state
        self.post(EdgeTold(offline))
        await self._follower.look()
        await self.reread()
        for loop in (
            self._decide(),
            self._follower.publish(),
            self._follower.watch(),
            self._watch_names(),
            self._flush(),
        ):
            self._spawn(loop)
        self._arm(0.0)

    async def _remembered(self) -> Mapping[str, Any]:
        """The table of an earlier life, empty where it is not known."""
        try:
            return await self._plane.remembered() or {}
        except (PlaneUnreachable, PlaneRefused):
            return {}

    def _recall(self, table: Mapping[str, Any]) -> Saved:
        """What is known without a store: the servers as nginx's table has them.

        Warm-ups are counted from the time of day on, for nginx may know the numbers of forgotten ones.
        """
        now = self.clock.now()
        known = recall.peers(table, now)
        if known:
            away = [f"{name}: {key}" for (name, key), peer in known.items() if peer.admin is not Admin.READY]
            text = f"the store is new; {len(known)} servers are taken over as nginx's table has them"
            self._notes.append(Note("store", f"{text}, without traffic {', '.join(away)}" if away else text))
        return Saved(now, self.clock.boot(), next_epoch=int(self.clock.wall()), peers=known)

    async def close(self) -> None:
        """Stop deciding and let go of everything; traffic stays as it is, running changes go on in the next life."""
        if self._ticker:
            self._ticker.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._prober.close()
        await self._plane.close()
        await self._keep_traffic()
        await self.store.close()

    async def reread(self) -> None:
        """Read nginx's configuration again."""
        try:
            config = await self._source.read()
        except ConfigError as error:
            self.post(ConfigFailed(str(error)))
        else:
            self.post(self._understood(config))

    # --- for callers ----------------------------------------------------------------------------------------------

    def post(self, event: Event) -> None:
        """Tell what happened; nobody waits for it."""
        self._queue.put_nowait(_Asked(event))

    async def wish(self, event: Wish) -> Outcome:
        """Wish something, and return when it is decided and stored; Refused, StoreError (and then nothing changed)."""
        return await self.tell(event)

    async def tell(self, event: Event) -> Outcome:
        """Tell what happened, and return when the state follows it."""
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Asked(event, answer))
        return await answer

    async def set_edge(self, offline: bool) -> None:
        """Take this edge host offline or back, and return when that is stored; StoreError."""
        async with self._telling_edge:
            await self._edge.set_offline(offline)
            await self.tell(EdgeTold(offline))

    async def clients(self) -> int:
        """Connections that clients hold to nginx; PlaneUnreachable."""
        return await self._edge.clients()

    async def read_config(self, meant: Mapping[Parameter, str | None] | None = None) -> NginxConfig:
        """Read nginx's configuration again, and return when the state follows it; ConfigError, shown there as well.

        `meant` is what its author wants where Headgate's own values stand; PlaneRefused.
        """
        await self._plane.mean(meant or {})
        try:
            config = await self._source.read()
        except ConfigError as error:
            await self.tell(ConfigFailed(str(error)))
            raise
        await self.tell(self._understood(config))
        return config

    async def published(self, seconds: float) -> None:
        """Return when nginx serves everything decided until now; PlaneUnreachable when it does not within `seconds`."""
        revision = self.state.revision
        deadline = self.clock.now() + seconds
        while self.state.plane.error or self.state.plane.revision < revision:
            left = deadline - self.clock.now()
            if left <= 0:
                plane = self.state.plane
                raise PlaneUnreachable(
                    f"recorded, but not yet published: {plane.trouble or 'nginx serves an older table'}",
                    "it follows by itself as soon as nginx takes the table"
                    if plane.refused and not plane.error
                    else "it follows by itself as soon as nginx answers on its control socket",
                )
            await self.changed(self.version, left)

    async def loaded(self) -> None:
        """Return when nginx has loaded the `server` lines as they stand; PlaneUnreachable, PlaneRefused."""
        await self._plane.load()

    @property
    def counters(self) -> Counters:
        """nginx's counters as they were last read."""
        return self._follower.counters

    async def emptied(self, upstream: str, keys: tuple[str, ...], revision: int, seconds: float) -> dict[str, int]:
        """Requests in flight at these servers, by key, once nginx serves `revision` and there are none, or after
        `seconds`; PlaneUnreachable, PlaneRefused."""
        return await self._follower.emptied(upstream, keys, revision, seconds)

    async def change(self, number: int) -> ChangeRecord | None:
        """A change as recorded, with what it did once it has ended; StoreError."""
        record = await self.store.change(number)
        if record is None or record.plan is None or record.outcome or record.ended_at is None:
            return record
        await self._keep_traffic()
        return await judged(self.store, record, self.state.groups.get(record.upstream))

    async def traffic(
        self, upstream: str, since: int, until: int, step: int, server: str | None = None
    ) -> tuple[TrafficRecord, ...]:
        """What servers got, up to the last reading of nginx's counters; as `Store.traffic`."""
        await self._keep_traffic()
        return await self.store.traffic(upstream, since, until, step, server)

    async def changed(self, after: int, seconds: float) -> int:
        """The version, as soon as it differs from `after`, or after `seconds`."""
        if self.version == after:
            changed = self._changed
            try:
                async with asyncio.timeout(seconds):
                    await changed.wait()
            except TimeoutError:
                return self.version
        return self.version

    async def follow(self, after: int | None) -> AsyncIterator[EventRecord]:
        """Recorded events with an id above `after` (None: from now on), then each as it is recorded."""
        if after is None:
            newest = await self.store.events(limit=1)
            after = newest[-1].id if newest else 0
        while True:
            recorded = self._recorded
            while page := await self.store.events(after=after):
                for record in page:
                    after = record.id
                    yield record
            await recorded.wait()

    def alive(self) -> bool:
        """Whether the deciding task still turns."""
        return self.clock.now() - self._turned < STALLED

    def problems(self) -> list[str]:
        """Why the daemon cannot do all of its work now; empty when it can."""
        found = [self.state.config_error, self.state.plane.trouble, self.store_error]
        if not self.state.configured and not self.state.config_error:
            found.append("nginx.conf has not been read yet")
        return [problem for problem in found if problem]

    # --- deciding -------------------------------------------------------------------------------------------------

    async def _decide(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            wishes = [asked for asked in batch if isinstance(asked.event, Wish)]
            before = self.state
            for asked in batch:
                if asked not in wishes:
                    self._take(asked)
            self._aim(before)
            await self._save()
            self._bump(before)
            for asked in wishes:
                await self._grant(asked)
            self._turned = self.clock.now()

    def _take(self, asked: _Asked) -> None:
        self.state, outcome = step(self.state, asked.event, self.clock.now())
        self._queue_effects(outcome)
        if isinstance(asked.event, Ticked):
            self._on_turn()
            self._arm()
        asked.resolve(outcome)

    async def _grant(self, asked: _Asked) -> None:
        """Decide a wish. What could not be recorded has not happened."""
        before, notes, held = self.state, list(self._notes), list(self._held)
        try:
            self.state, outcome = step(before, asked.event, self.clock.now())
            self._queue_effects(outcome)
            await self._save(strict=True)
        except (Refused, StoreError) as refusal:
            self.state, self._notes, self._held = before, notes, held
            asked.resolve(refusal)
            return
        self._aim(before)
        self._bump(before)
        self._arm(BUSY)
        asked.resolve(outcome)

    def _queue_effects(self, outcome: Outcome) -> None:
        for effect in outcome.effects:
            if isinstance(effect, Note):
                self._notes.append(effect)
            else:
                self._held.append(effect)

    async def _save(self, strict: bool = False) -> None:
        """Record what has changed, then carry out what waits for that.

        While the store fails, health and publishing go on; wishes and steps of changes do not.
        """
        # The deadlines of changes do not count the time since the last record: where they run, that must not be long.
        late = change.busy(self.state) and self.clock.now() - self._stored_at >= FLUSH
        delta = between(self._stored, self.state, self._notes, self.clock, again=late or bool(self.store_error))
        if delta is not None:
            state = self.state
            try:
                records = await self.store.save(delta)
            except StoreError as error:
                self._store_fails(error)
                self._notes = self._notes[-NOTES:]
                if strict:
                    raise
                return
            self.store_error = ""
            self._stored, self._stored_at, self._notes = state, delta.now, []
            for record in records:
                log.info(record.text, kind=record.kind, upstream=record.upstream, server=record.server)
            if records:
                self._recorded.set()
                self._recorded = asyncio.Event()
        held, self._held = self._held, []
        for effect in held:
            if isinstance(effect, RunStep):
                self._spawn(self._run_step(effect))
            elif isinstance(effect, TellConsumers):
                self._spawn(self._tell(effect))
            elif isinstance(effect, ProbeNow):
                self._prober.probe_now(effect.upstream, effect.server)

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(FLUSH)
            await self._keep_traffic()
            try:
                for number in await self.store.unjudged():
                    await self.change(number)
            except StoreError as error:
                self._store_fails(error)

    async def _keep_traffic(self) -> None:
        """Record what the servers got. While the store fails there is a gap."""
        if rows := self._follower.sampler.take():
            try:
                await self.store.save_traffic(rows, self.clock.wall())
            except StoreError as error:
                self._store_fails(error)

    def _store_fails(self, error: StoreError) -> None:
        if str(error) != self.store_error:
            log.error("the store cannot be written", error=str(error))
        self.store_error = str(error)

    def _aim(self, before: State) -> None:
        """See that exactly the right servers are probed."""
        if self.state.groups is not before.groups:
            self._prober.set_targets(
                {
                    (name, server.key): Target(server, check, _pace(group.peers[server.key]))
                    for name, group in self.state.groups.items()
                    for check in (self.check_for(name),)
                    for server in group.upstream.servers
                    if group.peers[server.key].admin is not Admin.MAINT
                }
            )

    def _bump(self, before: State) -> None:
        """Let everybody who waits look again: nginx is told now, when the state is stored."""
        if self.state is before:
            return
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def _arm(self, at_most: float | None = None) -> None:
        """Set the next tick: soon while a change runs."""
        wait = BUSY if change.busy(self.state) else IDLE
        wait = wait if at_most is None else min(wait, at_most)
        if (due := peers.next_expiry(self.state)) is not None:
            wait = min(wait, max(0.0, due - self.clock.now()))
        loop = asyncio.get_running_loop()
        if self._ticker and not self._ticker.cancelled() and loop.time() < self._tick_at <= loop.time() + wait:
            return
        if self._ticker:
            self._ticker.cancel()
        self._tick_at = loop.time() + wait
        self._ticker = loop.call_at(self._tick_at, self.post, Ticked())

    # --- acting ---------------------------------------------------------------------------------------------------

    async def _run_step(self, job: RunStep) -> None:
        """Carry out one step of a change and report; whatever goes wrong fails the step, with its reason."""
        report: Event | None
        try:
            if job.name in EDITS:
                report = await edit(job, self.members)
                await self.read_config()  # the change goes on with the server as it is then
            else:
                group = self.state.groups.get(job.upstream)
                report = await carry_out(job, group, self.check_for(job.upstream), self._processes, self.clock.wall())
        except HeadgateError as error:
            report = StepFailed(job.change, job.step, str(error))
        except Exception as error:
            log.exception("a step failed unexpectedly", change=job.change, step=job.name, server=job.server)
            report = StepFailed(job.change, job.step, f"unexpected: {error!r}")
        if report:
            self.post(report)

    async def _tell(self, wanted: TellConsumers) -> None:
        """Tell consumers and report who heard it."""
        group = self.state.groups.get(wanted.upstream)
        try:
            said = await tell(group, wanted.server, self.clock.wall())
        except Exception as error:
            log.exception("consumers could not be told", upstream=wanted.upstream, server=wanted.server)
            said = f"unexpected: {error!r}"
        self.post(ConsumersTold(wanted.upstream, wanted.server, said))

    async def _watch_names(self) -> None:
        """Follow the addresses of host names in `server` lines."""
        while True:
            await asyncio.sleep(self._resolve_interval)
            config = await self._source.resolve_again()
            if config is not None:
                self.post(self._understood(config))

    def _understood(self, config: NginxConfig) -> ConfigRead:
        if self.config is None or config.warnings != self.config.warnings:
            for warning in config.warnings:
                log.warning(warning)
        self.config = config
        return ConfigRead(config.upstreams, config.unhooked)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a task of the daemon failed", exc_info=error)
            self.failed.set()


def _pace(peer: Peer) -> Pace:
    """How often a server is probed: soon while its verdict is about to change, else as is right for its health."""
    if (peer.passes and peer.health is not Health.UP) or (peer.fails and peer.health is not Health.DOWN):
        return Pace.FAST
    return Pace.DOWN if peer.health is Health.DOWN else Pace.STEADY
