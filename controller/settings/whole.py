"""headgate.toml as a whole: the tables that exist once, and what follows from all of them together."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from controller.core.policy import Policy
from controller.ports import Check
from controller.settings.tables import Tables
from controller.settings.values import (
    AbsolutePath,
    Duration,
    Listen,
    PositiveDuration,
    ReadableFile,
    StoreUrl,
    Table,
)


class Nginx(Table):
    """[nginx]: which nginx this is, and how it is reached."""

    conf: AbsolutePath = "/etc/nginx/nginx.conf"
    data_plane: Literal["lua", "reload"] = "lua"
    control: AbsolutePath = "/run/headgate/nginx.sock"
    snapshot: AbsolutePath = "/var/lib/headgate/table.json"
    include: AbsolutePath = "/etc/headgate/nginx-http.conf"
    version_socket: AbsolutePath = "/run/headgate/version.sock"
    version_file: AbsolutePath = "/var/lib/headgate/version.conf"
    resolve_interval: PositiveDuration = 10.0


class Api(Table):
    """[api]: where the daemon answers."""

    socket: AbsolutePath = "/run/headgate/api.sock"
    listen: Listen = "127.0.0.1:9470"
    token_file: ReadableFile | None = None

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        host, _ = self.address or ("localhost", 0)
        try:
            loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            loopback = False
        if not loopback and self.token_file is None:
            raise ValueError(f"{self.listen!r} is open to others; set token_file, or listen on 127.0.0.1")
        return self

    @property
    def address(self) -> tuple[str, int] | None:
        """Host without brackets and port of `listen`, None where it is off."""
        host, _, port = self.listen.rpartition(":")
        return (host.strip("[]"), int(port)) if host else None


class Readiness(Table):
    """[readiness]: a second place for /readiness and /health, for orchestrators. Off where `listen` is empty."""

    listen: Listen = ""
    warm: bool = False


class Store(Table):
    """[store]: where changes, events and traffic are remembered, and how much of it."""

    url: StoreUrl = "sqlite:////var/lib/headgate/state.db"
    keep_events: Annotated[int, Field(ge=1000)] = 50_000
    keep_traffic: Annotated[Duration, Field(ge=60)] = 86400.0
    keep_changes: Annotated[int, Field(ge=100)] = 10_000


class Log(Table):
    """[log]: what the daemon writes to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


class Settings(Table):
    """headgate.toml as a whole. `upstream` holds each named upstream with the defaults joined in."""

    nginx: Nginx = Nginx()
    api: Api = Api()
    readiness: Readiness = Readiness()
    store: Store = Store()
    log: Log = Log()
    defaults: Tables = Tables()
    upstream: dict[str, Tables] = {}  # noqa: RUF012 - pydantic copies it

    @model_validator(mode="after")
    def _fits_the_plane(self) -> Self:
        if self.nginx.data_plane == "reload":
            for name, tables in {"defaults": self.defaults, **self.upstream}.items():
                place = name if tables is self.defaults else f"upstream.{name}"
                for key, set_to in (("balance.method", tables.balance.method), ("sticky.cookie", tables.sticky.cookie)):
                    if set_to:
                        raise ValueError(
                            f'{place}.{key} = "{set_to}" needs the Lua data plane; '
                            'take it out, or take out data_plane = "reload"'
                        )
        return self

    @property
    def journal(self) -> Path:
        """The directory for what is under way in nginx's files, beside the store."""
        return self._beside_store("edits")

    @property
    def nginx_state(self) -> Path:
        """The file in which the reload plane remembers what it wrote, beside the store."""
        return self._beside_store("reload.json")

    @property
    def edge_mark(self) -> Path:
        """The file that is there while this edge host is offline, beside the store."""
        return self._beside_store("edge-offline")

    def _beside_store(self, name: str) -> Path:
        return Path(self.store.url.removeprefix("sqlite:///")).with_name(name)

    def policy_for(self, upstream: str) -> Policy:
        """What decisions about this upstream rest on."""
        return self.upstream.get(upstream, self.defaults).policy()

    def check_for(self, upstream: str) -> Check:
        """How the servers of this upstream are probed, and their agents asked."""
        tables = self.upstream.get(upstream, self.defaults)
        agent = Check(type="agent", **tables.agent.model_dump()) if tables.agent.port else None
        return Check(**tables.check.model_dump(exclude={"rise", "fall"}), agent=agent)
