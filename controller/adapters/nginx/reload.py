"""The data plane without a module: routing tables as weights and `down` marks in the user's files, verified reloads.

What a table means for a line is decided in controller/core/quantise.py, what is whose in controller/conf/ledger.py, how
files are written and a reload is proved in writer.py and verify.py. Here stands their order, and when it is time.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from controller.adapters.nginx import sockets
from controller.adapters.nginx.files import DiskReader
from controller.adapters.nginx.lines import Plan, Table, planned
from controller.adapters.nginx.memory import Memory
from controller.adapters.nginx.verify import Reloader, ReloadFailed, Worker, workers
from controller.adapters.nginx.writer import Changed, CheckFailed, ConfWriter, WriteFailed
from controller.adapters.pidfd import Identity, is_alive
from controller.conf.diff import FileEdit
from controller.conf.draft import EditRefused
from controller.conf.index import Index
from controller.conf.parse import ConfSyntaxError, Tree
from controller.core.quantise import Key, Pace, Ramp, Unsayable, follow, shares, shown, with_shown
from controller.ports import Clock, Counters, Parameter, PeerCounters, PlaneRefused, PlaneStatus, PlaneUnreachable

log = structlog.get_logger("headgate")

ATTEMPTS = 4  # reloads for one table, while somebody else keeps changing the same lines
TROUBLE = frozenset({"contended", "reload_failed", "roll_back_failed"})  # after these, no reload for `patience` seconds
ROOM = 0.25  # seconds between two looks whether an old generation has ended
GENERATION = 0.1  # seconds: workers that were made further apart are of two reloads


@dataclass(slots=True)
class _Asked:
    """A table that somebody waits for, since when, and how often it was written already."""

    table: Table
    answer: asyncio.Future[PlaneStatus]
    since: float
    attempts: int = 0


class ReloadPlane:
    """Fulfils ports.DataPlane over the configuration at `conf`; docs/reload-plane.md.

    `state` is a file of ours. No more than `generations` of workers may be shutting down; a table waits `patience`
    seconds for that, and so long there is no reload after one that came to nothing. One task owns all writing: it runs
    from the first call to `close`.
    """

    def __init__(
        self,
        conf: Path,
        state: Path,
        writer: ConfWriter,
        reloader: Reloader,
        clock: Clock,
        *,
        pace: Pace | None = None,
        generations: int = 2,
        patience: float = 30.0,
    ) -> None:
        self._conf = conf
        self._state = state
        self._writer = writer
        self._reloader = reloader
        self._clock = clock
        self._pace = pace or Pace()
        self._generations = generations
        self._patience = patience
        self._memory: Memory | None = None
        self._index: Index | None = None
        self._holders: dict[Key, frozenset[Identity]] = {}
        self._asked: list[_Asked] = []
        self._last = clock.now() - self._pace.interval
        self._wake = asyncio.Event()
        self._turning = asyncio.Lock()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    # --- ports.DataPlane ------------------------------------------------------------------------------------------

    async def status(self) -> PlaneStatus:
        """nginx's master as the boot id, and the last table that is proved to be served; PlaneUnreachable."""
        await self._begin()
        master, version = await self._look()
        seen = await asyncio.to_thread(workers, master[0])
        return PlaneStatus(_boot(master), self._revision(version), tuple(worker.identity[0] for worker in seen))

    async def publish(self, table: Mapping[str, object]) -> PlaneStatus:
        """Bring the table into nginx, at once if the last reload is long enough ago, and return when that is proved.

        PlaneUnreachable, PlaneRefused: nginx serves what it served before, and the files are as they were.
        """
        task = await self._begin()
        served = await self.status()
        revision, memory = int(str(table["revision"])), self._known
        known = memory.table is not None and memory.table["revision"] == served.revision and not memory.dirty
        if known and table == memory.table:
            return served
        if revision < served.revision or (known and revision == served.revision):
            message = f"revision {revision} is not newer than {served.revision}, which nginx serves"
            raise PlaneRefused("stale_revision", message, "publish a higher revision", served.revision)
        return await self._bring(table, task)

    async def counters(self, upstream: str | None = None) -> Counters:
        """Sockets that nginx's workers hold to each server; PlaneUnreachable.

        Of a server without traffic only those count that belong to workers older than the generation which serves
        without it. `requests` and `failures` are not known here, and 0.
        """
        await self._begin()
        master, version = await self._look()
        memory, holders = self._known, dict(self._holders)
        revision, now = self._revision(version), self._clock.now()
        table = memory.table or {"upstreams": {}}
        servers = {
            (name, server["key"]): (server["ip"], server["port"])
            for name, each in table["upstreams"].items()
            if upstream in (None, name)
            for server in each["servers"]
        }
        counts = await asyncio.to_thread(_in_flight, master, servers, memory.without, holders)
        found: dict[str, dict[str, PeerCounters]] = {name: {} for name, _ in servers}
        for (name, key), count in counts.items():
            ramp = memory.ramps.get((name, key))
            warm = (None, 0.0, False) if ramp is None or ramp.ended else (ramp.epoch, ramp.time(now), True)
            found[name][key] = PeerCounters(count, 0, 0, *warm)
        return Counters(_boot(master), revision, found)

    async def remembered(self) -> Mapping[str, Any] | None:
        """The table that the state file holds; None where there is none."""
        await self._begin()
        return self._known.table

    async def mean(self, meant: Mapping[Parameter, str | None]) -> None:
        """The author wants these values where ours stand: from now on they are what goes back there; PlaneRefused."""
        await self._begin()
        async with self._turning:
            for name in meant.keys() - self._known.ledger.entries.keys():
                message = f"{name[3]} of {name[1]} in upstream {name[0]} is its author's by now"
                raise PlaneRefused("contended", message, "say it again")
            if (ledger := self._known.ledger.meaning(meant)) != self._known.ledger:
                await self._remember(replace(self._known, ledger=ledger))

    async def load(self) -> None:
        """Return when nginx has loaded the managed upstreams' lines as they stand; PlaneUnreachable, PlaneRefused."""
        task = await self._begin()
        if (table := self._known.table) is not None:
            await self._bring(table, task)

    async def close(self) -> None:
        """Finish a reload that is under way; traffic stays as it is."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task

    def without_ours(self, tree: Tree) -> Tree:
        """A configuration as its author means it, without the weights and marks that this plane has written. Blocks."""
        if self._memory is None:
            self._memory = Memory.load(self._state, self._clock)
        return self._memory.ledger.without_ours(tree)

    # --- what is so -----------------------------------------------------------------------------------------------

    @property
    def _known(self) -> Memory:
        return self._memory or Memory()

    async def _begin(self) -> asyncio.Task[None]:
        if self._memory is None:
            loaded = await asyncio.to_thread(Memory.load, self._state, self._clock)
            self._memory = self._memory or loaded  # another call may have been first
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())
        elif self._task.done() and not self._closing:
            self._task.result()
        return self._task

    async def _bring(self, table: Table, task: asyncio.Task[None]) -> PlaneStatus:
        """Have `task` bring this table into nginx, or a newer one, and wait for it."""
        asked = _Asked(table, asyncio.get_running_loop().create_future(), self._clock.now())
        self._asked = [*self._asked, asked]
        self._wake.set()
        try:
            await asyncio.wait((asked.answer, task), return_when=asyncio.FIRST_COMPLETED)
            if not asked.answer.done():
                task.result()
                raise PlaneUnreachable("the data plane was closed", "publish again in the next life")
            return asked.answer.result()
        finally:
            asked.answer.cancel()

    async def _look(self) -> tuple[Identity, str]:
        master = await self._reloader.master()
        return master, await self._reloader.served()

    def _revision(self, version: str) -> int:
        """The table that nginx serves for certain, 0 for none: what is under way does not count yet."""
        memory = self._known
        if memory.dirty or memory.version:
            proved = memory.dirty or version == memory.version
            return int(memory.table["revision"]) if memory.table and proved else 0
        number = version.partition("-")[0]  # our own file was lost
        return int(number) if number.isdecimal() else 0

    # --- the task -------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while not self._closing:
            self._wake.clear()
            batch = self._asked = [asked for asked in self._asked if not asked.answer.done()]
            try:
                async with self._turning:
                    wait = await self._turn()
            except (PlaneUnreachable, PlaneRefused) as error:
                trouble = isinstance(error, PlaneRefused) and error.code in TROUBLE
                self._last = self._clock.now() + (self._patience if trouble else 0.0)
                wait = self._pace.interval
                if not batch:
                    log.error("a warm-up cannot go on", error=str(error))
                for asked in batch:
                    if not asked.answer.done():
                        asked.answer.set_exception(error)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    async def _turn(self) -> float | None:
        """Do what is due; seconds until the next turn, None: until somebody asks."""
        asked = max(self._asked, key=lambda each: int(each.table["revision"]), default=None)
        table = asked.table if asked else self._known.table
        if table is None:
            return None
        now = self._clock.now()
        ramps = follow(self._known.ramps, table, now)
        due = self._pace.due(asked is not None, ramps, self._last, now)
        if due is None or (asked is None and due > now):
            return None if due is None else due - now
        master, version = await self._look()
        target = shown(ramps, now, self._pace.steps) if asked else shares(ramps, now, self._pace.steps)
        made = await self._plan(table, target)
        if self._loaded(made) and await asyncio.to_thread(self._reloader.on_disk, version):
            exiting = frozenset(each.identity for each in await asyncio.to_thread(workers, master[0]) if each.exiting)
            await self._accept(table, with_shown(ramps, target), made, version, exiting)
            return 0.0
        if due > now:
            return due - now
        if await self._crowded(master[0], asked, now):
            return ROOM if asked else self._pace.interval
        target = shares(ramps, now, self._pace.steps)
        made = await self._plan(table, target)
        try:
            version, older = await self._reload(made, int(table["revision"]))
            after = await self._plan(table, target)
        except Changed:
            self._last, after = self._clock.now(), None
        if after is None or after.files or after.says != made.says:
            self._contend(asked)
            return 0.0
        await self._accept(table, with_shown(ramps, target), after, version, older)
        return 0.0

    def _loaded(self, made: Plan) -> bool:
        """Whether nginx has loaded what this plan wants: that a file says so proves nothing, for people edit too."""
        known = self._known
        return not made.files and not known.dirty and made.says.items() <= known.says.items()

    async def _crowded(self, master: int, asked: _Asked | None, now: float) -> bool:
        """Whether so many generations are shutting down that another one must wait; PlaneRefused after `patience`."""
        exiting = [each for each in await asyncio.to_thread(workers, master) if each.exiting]
        count = _generations(exiting)
        if count < self._generations:
            return False
        if asked is not None and now - asked.since > self._patience:
            pids = ", ".join(str(worker.identity[0]) for worker in exiting)
            raise PlaneRefused(
                "crowded",
                f"{count} generations of nginx's workers are still shutting down ({pids})",
                "set worker_shutdown_timeout in nginx.conf, or end the long connections that they hold",
            )
        return True

    def _contend(self, asked: _Asked | None) -> None:
        if asked is not None:
            asked.attempts += 1
            if asked.attempts >= ATTEMPTS:
                raise PlaneRefused(
                    "contended",
                    f"somebody else changed the same server lines during each of {ATTEMPTS} attempts",
                    "let go of the weights and down marks in nginx.conf, or of this upstream (headgate release)",
                )

    async def _plan(self, table: Table, target: Mapping[Key, float]) -> Plan:
        try:
            return await asyncio.to_thread(self._planned, table, target)
        except (ConfSyntaxError, OSError) as error:
            raise PlaneRefused("config", str(error), "correct it and see what `nginx -t` says") from error
        except EditRefused as error:
            raise PlaneRefused("edit_refused", str(error), "change that line; docs/editing.md explains") from error
        except Unsayable as error:
            raise PlaneRefused("unsayable", str(error), "the Lua data plane can do it") from error

    async def _reload(self, made: Plan, revision: int) -> tuple[str, frozenset[Identity]]:
        """Write, reload and prove; the version that serves now and the workers from before. All back where it fails."""
        before = self._known
        await self._remember(replace(before, ledger=made.ledger, dirty=True))
        try:
            await self._writer.apply(made.files)
            self._take(made.files)
        except (Changed, CheckFailed, WriteFailed) as error:
            await self._remember(before)
            if isinstance(error, Changed):
                raise
            raise PlaneRefused("write_failed", error.message, error.remedy) from error
        version = f"{revision}-{secrets.token_hex(4)}"
        try:
            older = await self._reloader.reload(version, checked=bool(made.files))
        except (ReloadFailed, PlaneUnreachable) as error:
            await self._roll_back(made.files, before, error)
            if isinstance(error, PlaneUnreachable):
                raise
            raise PlaneRefused("reload_failed", f"{error.message}; everything was put back", error.remedy) from error
        finally:
            self._last = self._clock.now()
        return version, older

    async def _roll_back(
        self, files: Iterable[FileEdit], before: Memory, failure: ReloadFailed | PlaneUnreachable
    ) -> None:
        """Give every file its bytes back; nginx, where it may have read the new ones, reads them again."""
        back = [replace(each, before=each.after, after=each.before, splices=()) for each in files]
        try:
            await self._writer.apply(back)
            if isinstance(failure, ReloadFailed) and failure.taken:
                revision = before.table["revision"] if before.table else 0
                before = replace(before, version=f"{revision}-{secrets.token_hex(4)}", dirty=False)
                await self._reloader.reload(before.version, checked=bool(back))
            await self._remember(before)
        except (Changed, CheckFailed, WriteFailed, ReloadFailed, PlaneUnreachable) as error:
            raise PlaneRefused(
                "roll_back_failed",
                f"{failure.message}; and going back failed: {error.message}",
                f"see what `nginx -t` says and reload nginx by hand; {error.remedy}",
            ) from error

    async def _accept(
        self, table: Table, ramps: Mapping[Key, Ramp], made: Plan, version: str, older: frozenset[Identity]
    ) -> None:
        """nginx is proved to serve this table: remember it, and answer those who asked for it or an earlier one."""
        ledger = made.ledger.settled(made.lines)
        await self._remember(Memory(version, table, ramps, made.without, ledger, says=made.says))
        self._holders = {key: self._holders.get(key, older) for key in made.without}
        status = await self.status()
        for asked in self._asked:
            if asked.table["revision"] <= table["revision"] and not asked.answer.done():
                asked.answer.set_result(status)

    def _planned(self, table: Table, target: Mapping[Key, float]) -> Plan:
        known, reader = self._index, DiskReader()
        if known:
            self._index = known.current(reader, whole=not all(map(known.holds, table["upstreams"])))
        else:
            self._index = Index(str(self._conf), reader)
        return planned(self._index, table, target, self._known.ledger)

    def _take(self, files: Iterable[FileEdit]) -> None:
        """The index follows what was written without reading it."""
        for each in files:
            if self._index is not None:
                self._index.take(each.path, each.after, each.splices)

    async def _remember(self, memory: Memory) -> None:
        await asyncio.to_thread(memory.save, self._state, self._clock)
        self._memory = memory


def _boot(master: Identity) -> str:
    return f"{master[0]}-{master[1]:.2f}"


def _generations(exiting: Iterable[Worker]) -> int:
    """How many reloads made these workers old: those of one were made together."""
    made = sorted(worker.identity[1] for worker in exiting)
    return sum(index == 0 or at - made[index - 1] > GENERATION for index, at in enumerate(made))


def _in_flight(
    master: Identity,
    servers: Mapping[Key, sockets.Endpoint],
    without: frozenset[Key],
    holders: Mapping[Key, frozenset[Identity]],
) -> dict[Key, int]:
    """How many sockets lead to each server, of the workers that count for it."""
    leading = sockets.to_servers(frozenset(servers.values()), master[0])
    seen = workers(master[0])
    everybody = frozenset(worker.identity for worker in seen)
    exiting = frozenset(worker.identity for worker in seen if worker.exiting)
    counting = {key: holders.get(key, exiting) if key in without else everybody for key in servers}
    held = {
        identity: [leading[inode] for inode in sockets.held(identity[0]) & leading.keys()]
        for identity in frozenset().union(*counting.values())
        if leading and is_alive(identity)
    }
    if not is_alive(master):
        raise PlaneUnreachable(f"nginx's master {master[0]} has ended", "start nginx")
    return {key: sum(held.get(identity, []).count(servers[key]) for identity in counting[key]) for key in servers}
