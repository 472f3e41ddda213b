"""The runtime as the API sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

from controller.core.events import (
    AdminWished,
    ChangeWished,
    OfflineNoticed,
    OnlineNoticed,
    Outcome,
    SteerWished,
    WarmUpWished,
)
from controller.core.model import State
from controller.ports import (
    ChangeRecord,
    Check,
    Clock,
    Counters,
    EventRecord,
    Members,
    NginxConfig,
    Parameter,
    Store,
    TrafficRecord,
)


class Runtime(Protocol):
    """State to read, wishes to make, news to wait for."""

    @property
    def state(self) -> State:
        """What is known and wished now."""

    @property
    def counters(self) -> Counters:
        """What nginx counted, as last read."""

    @property
    def config(self) -> NginxConfig | None:
        """nginx.conf as last read; None before."""

    @property
    def store(self) -> Store:
        """For records of changes and events."""

    @property
    def members(self) -> Members:
        """The `server` lines in nginx's own files."""

    @property
    def version(self) -> int:
        """Grows with every change of what can be seen here."""

    @property
    def clock(self) -> Clock:
        """The clock that the state is reckoned with."""

    @property
    def check_for(self) -> Callable[[str], Check]:
        """How the servers of an upstream are probed."""

    @property
    def data_plane(self) -> str:
        """`lua` or `reload`."""

    async def wish(
        self, event: AdminWished | ChangeWished | SteerWished | OfflineNoticed | OnlineNoticed | WarmUpWished
    ) -> Outcome:
        """Decide and store; Refused, StoreError."""

    async def set_edge(self, offline: bool) -> None:
        """Take this edge host offline or back, and return when that is stored; StoreError."""

    async def clients(self) -> int:
        """Connections that clients hold to nginx; PlaneUnreachable."""

    async def read_config(self, meant: Mapping[Parameter, str | None] | None = None) -> NginxConfig:
        """Read nginx's configuration again and return when the state follows it; ConfigError, PlaneRefused."""

    async def published(self, seconds: float) -> None:
        """Return when nginx serves the state's revision; PlaneUnreachable or PlaneRefused when it is not in time."""

    async def loaded(self) -> None:
        """Return when nginx has loaded the `server` lines as they stand; PlaneUnreachable, PlaneRefused."""

    async def emptied(self, upstream: str, keys: tuple[str, ...], revision: int, seconds: float) -> dict[str, int]:
        """Requests in flight at these servers, by key, once nginx serves `revision` and there are none, or after
        `seconds`; PlaneUnreachable, PlaneRefused."""

    async def change(self, number: int) -> ChangeRecord | None:
        """A change as recorded, with what it did once it has ended; StoreError."""

    async def traffic(
        self, upstream: str, since: int, until: int, step: int, server: str | None = None
    ) -> tuple[TrafficRecord, ...]:
        """What servers got in each step of `step` seconds from `since` to `until`; as `Store.traffic`."""

    async def changed(self, after: int, seconds: float) -> int:
        """The version, as soon as it differs from `after`, or as it is when the seconds have passed."""

    def follow(self, after: int | None) -> AsyncIterator[EventRecord]:
        """Recorded events with id > `after` (None: from now on), then each as it is recorded."""

    def alive(self) -> bool:
        """Whether the runtime task takes events."""

    def problems(self) -> list[str]:
        """Why the daemon is not ready, as sentences; empty when it is."""
