"""headgate.toml: the schema with its defaults, the file, the environment; validated once, every error at once.

What a key means to a decision stands with the core's policies; docs/settings.md lists every key for users.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import ssl
import tomllib
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from controller.core.model import (
    BalancePolicy,
    DrainPolicy,
    HealthPolicy,
    NoticePolicy,
    OutlierPolicy,
    Policy,
    ProcessPolicy,
    QuarantinePolicy,
    RolloutPolicy,
    StickyPolicy,
    WarmUpPolicy,
)
from controller.errors import SettingsError
from controller.ports import Check

DEFAULT_FILE = "/etc/headgate/headgate.toml"

# --- values -----------------------------------------------------------------------------------------------------


def _duration(value: object) -> object:
    """Seconds of `2s`, `500ms`, `2m`, `1h` or a number."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(ms|s|m|h|)", str(value))
    if not match:
        raise ValueError(f'{value!r} is no duration; write "2s", "500ms", "2m", "1h" or a number of seconds')
    return float(match[1]) * {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _share(value: object) -> object:
    """The fraction that `10%` or `0.1` is."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(%|)", str(value))
    if not match or isinstance(value, bool):
        raise ValueError(f'{value!r} is no percentage; write "10%" or 0.1')
    share = float(match[1]) / (100 if match[2] else 1)
    if share > 1:
        raise ValueError(f'{value!r} is more than the whole; write "{match[1]}%" or at most 1.0')
    return share


def _statuses(value: object) -> object:
    """Inclusive ranges of `[200, "300-399"]`."""
    ranges = []
    for each in value if isinstance(value, list) else [value]:
        match = re.fullmatch(r"([1-5][0-9]{2})(?:-([1-5][0-9]{2}))?", str(each))
        if not match or int(match[1]) > int(match[2] or match[1]):
            raise ValueError(f'{each!r} is no HTTP status or range; write [200, "300-399"]')
        ranges.append((int(match[1]), int(match[2] or match[1])))
    return tuple(ranges)


def _absolute(path: str) -> str:
    if not os.path.isabs(path):
        raise ValueError(f'{path!r} is not an absolute path; begin it with "/"')
    return path


def _template(text: str) -> str:
    for name in re.findall(r"\{(\w*)\}", text):
        if name not in ("upstream", "address", "host", "port"):
            raise ValueError(
                f"{{{name}}} is no placeholder; there are {{upstream}}, {{address}}, {{host}} and {{port}}"
            )
    return text


def _readable(path: str) -> str:
    if not os.access(_absolute(path), os.R_OK):
        raise ValueError(f"{path!r} does not exist or cannot be read; create it or correct the path")
    return path


def _url_path(path: str) -> str:
    if not re.fullmatch(r"/[!-~]*", path):
        raise ValueError(f'{path!r} is no path of a URL; begin it with "/" and encode blanks')
    return path


def _one_line(text: str) -> str:
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError(f"{text!r} is no host name; take out blanks and control characters")
    return text


def _header(text: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:: *[ -~]+)?", text):
        raise ValueError(f'{text!r} is no header; write "Name", or "Name: part of its value"')
    return text


def _token(text: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]*", text):
        raise ValueError(f"{text!r} is no name of a cookie; use letters, digits, - and _")
    return text


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[!-~]+", text):
        raise ValueError(f'{text!r} is no URL; begin it with "http://" or "https://"')
    return text


def _variables(text: str) -> str:
    if text and "$" not in text:
        raise ValueError(f'{text!r} is the same for every request; write a variable of nginx, such as "$remote_addr"')
    for name in re.findall(r"\$\{?(\w*)", text):
        if not name:
            raise ValueError(f'{text!r} has a "$" without a name; write "$name" or "${{name}}"')
    return text


def _store(url: str) -> str:
    if not url.startswith("sqlite:////"):
        raise ValueError(f'{url!r} is no store; write "sqlite:///" and an absolute path, "{Store().url}"')
    return url


def _listen(value: str) -> str:
    if value:
        host, _, port = value.rpartition(":")
        if not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
            raise ValueError(f'{value!r} is no address to listen on; write "127.0.0.1:9470", or "" for none')
    return value


Duration = Annotated[float, BeforeValidator(_duration)]
PositiveDuration = Annotated[Duration, Field(gt=0)]
Share = Annotated[float, BeforeValidator(_share)]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]
Template = Annotated[str, AfterValidator(_template)]
TemplatePath = Annotated[AbsolutePath, AfterValidator(_template)]
ReadableFile = Annotated[str, AfterValidator(_readable)]
HostName = Annotated[str, AfterValidator(_one_line)]

# --- schema -----------------------------------------------------------------------------------------------------


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Nginx(_Table):
    """[nginx]: which nginx this is, and how it is reached."""

    conf: AbsolutePath = "/etc/nginx/nginx.conf"
    data_plane: Literal["lua", "reload"] = "lua"
    control: AbsolutePath = "/run/headgate/nginx.sock"
    snapshot: AbsolutePath = "/var/lib/headgate/table.json"
    include: AbsolutePath = "/etc/headgate/nginx-http.conf"
    version_socket: AbsolutePath = "/run/headgate/version.sock"
    version_file: AbsolutePath = "/var/lib/headgate/version.conf"
    resolve_interval: PositiveDuration = 10.0


class Api(_Table):
    """[api]: where the daemon answers."""

    socket: AbsolutePath = "/run/headgate/api.sock"
    listen: Annotated[str, AfterValidator(_listen)] = "127.0.0.1:9470"
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


class Readiness(_Table):
    """[readiness]: a second place for /readiness and /health, for orchestrators. Off where `listen` is empty."""

    listen: Annotated[str, AfterValidator(_listen)] = ""
    warm: bool = False


class Store(_Table):
    """[store]: where changes and events are remembered."""

    url: Annotated[str, AfterValidator(_store)] = "sqlite:////var/lib/headgate/state.db"


class Log(_Table):
    """[log]: what the daemon writes to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


class CheckTable(_Table):
    """[*.check]: how a server is probed, and how many results change the verdict."""

    type: Literal["http", "https", "tcp", "grpc", "grpcs", "agent"] = "http"
    path: Annotated[str, AfterValidator(_url_path)] = "/healthz"
    host: HostName | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    interval: Annotated[Duration, Field(ge=0.1)] = 2.0
    fast_interval: Annotated[Duration, Field(ge=0.1)] | None = None
    down_interval: Annotated[Duration, Field(ge=0.1)] | None = None
    timeout: PositiveDuration = 1.0
    jitter: Annotated[Share, Field(le=0.5)] = 0.1
    rise: Annotated[int, Field(ge=1)] = 2
    fall: Annotated[int, Field(ge=1)] = 3
    statuses: Annotated[tuple[tuple[int, int], ...], BeforeValidator(_statuses), Field(min_length=1)] = ((200, 399),)
    body: Annotated[str, Field(min_length=1)] | None = None
    header: Annotated[str, AfterValidator(_header)] | None = None
    ca_file: ReadableFile | None = None
    client_cert: ReadableFile | None = None
    client_key: ReadableFile | None = None
    server_name: HostName | None = None
    verify: bool = True
    service: str = ""
    send: str = ""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key in sorted(self.model_fields_set & _BELONGS.keys()):
            if self.type not in _BELONGS[key] and getattr(self, key) != type(self).model_fields[key].default:
                types = " or ".join(f'"{each}"' for each in _BELONGS[key])
                raise ValueError(f'{key} means nothing to type = "{self.type}"; take it out, or write type = {types}')
        if self.client_key and not self.client_cert:
            raise ValueError("client_key without client_cert; name the certificate, too, or take client_key out")
        _see_files(self.ca_file, self.client_cert, self.client_key)
        if (self.fast_interval or 0) > self.interval:
            raise ValueError(
                f"fast_interval ({self.fast_interval:g} s) is longer than interval ({self.interval:g} s); shorten it"
            )
        for name in ("interval", "fast_interval", "down_interval"):
            _see_time(self.timeout, name, getattr(self, name))
        return self


_WEB, _TLS, _GRPC = ("http", "https"), ("https", "grpcs"), ("grpc", "grpcs")
_BELONGS = {
    **dict.fromkeys(("path", "statuses", "body", "header"), _WEB),
    **dict.fromkeys(("ca_file", "client_cert", "client_key", "server_name", "verify"), _TLS),
    "host": _WEB + _GRPC,
    "service": _GRPC,
    "send": ("agent",),
}
"""The types of check that a key means something to; keys that are not here mean something to all."""


def _see_files(ca_file: str | None, cert: str | None, key: str | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
    except OSError as error:
        raise ValueError(f"ca_file {ca_file!r} holds no certificates in PEM ({error}); correct it") from error
    try:
        if cert:
            context.load_cert_chain(cert, key, password="")  # without one OpenSSL would ask the terminal
    except OSError as error:
        raise ValueError(
            f"{cert!r} and {key or cert!r} are not a certificate and its key ({error}); "
            "write PEM files that belong together, the key without a password"
        ) from error


def _see_time(timeout: float, name: str, interval: float | None) -> None:
    if interval is not None and timeout > interval:
        raise ValueError(f"timeout ({timeout:g} s) is longer than {name} ({interval:g} s); shorten it")


class AgentTable(_Table):
    """[*.agent]: a second check that asks the backend for its load, in the words of HAProxy's agent check."""

    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    interval: Annotated[Duration, Field(ge=0.1)] = 2.0
    timeout: PositiveDuration = 1.0
    send: str = ""

    @model_validator(mode="after")
    def _in_time(self) -> Self:
        _see_time(self.timeout, "interval", self.interval)
        return self


class HealthTable(_Table):
    """[*.health]: what becomes of a server's verdicts."""

    detector: Literal["count", "accrual"] = "count"
    phi: Annotated[float, Field(gt=0, le=100, strict=False)] = 8.0
    panic: Share = 0.0
    flaps: Annotated[int, Field(ge=0)] = 5
    flap_window: PositiveDuration = 60.0
    flap_hold: PositiveDuration = 30.0
    flap_cap: PositiveDuration = 300.0


class OutlierTable(_Table):
    """[*.outlier]: passive checks, by what the traffic shows."""

    errors: Annotated[int, Field(ge=0)] = 5
    timeouts: Annotated[int, Field(ge=0)] = 5
    server_errors: Annotated[int, Field(ge=0)] = 5
    interval: Annotated[Duration, Field(ge=1)] = 10.0
    base: PositiveDuration = 30.0
    cap: PositiveDuration = 300.0
    max_ejected: Share = 0.1
    hosts: Annotated[int, Field(ge=2)] = 5
    requests: Annotated[int, Field(ge=1)] = 100
    success_rate: Annotated[float, Field(ge=0, le=100, strict=False)] = 1.9
    latency: Annotated[float, Field(ge=0, le=1000, strict=False)] = 5.0


class QuarantineTable(_Table):
    """[*.quarantine]: what an offline notice does."""

    duration: PositiveDuration = 120.0
    marks: bool = True


class NoticesTable(_Table):
    """[*.notices]: who is told that a server goes offline."""

    enabled: bool = False
    consumers: Annotated[tuple[Annotated[str, AfterValidator(_url)], ...], Field(strict=False)] = ()
    tries: Annotated[int, Field(ge=1, le=10)] = 3
    timeout: PositiveDuration = 1.0
    deadline: PositiveDuration = 5.0

    @model_validator(mode="after")
    def _has_consumers(self) -> Self:
        if self.enabled and not self.consumers:
            raise ValueError('enabled without consumers; write consumers = ["http://…"], or take enabled out')
        return self


class BalanceTable(_Table):
    """[*.balance]: the method, where it is not nginx.conf's."""

    method: Literal["", "round_robin", "least_conn", "ewma", "hash", "ip_hash", "random"] = ""
    key: Annotated[str, AfterValidator(_variables)] = ""
    consistent: bool = True
    bound: Annotated[float, Field(ge=0, le=100, strict=False)] = 0.0
    two: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.method == "hash" and not self.key:
            raise ValueError('method = "hash" needs a key; write key = "$remote_addr", or another variable of nginx')
        if 0 < self.bound < 1:
            raise ValueError(f"bound = {self.bound:g} leaves requests without a server; write 1.25, or 0 for none")
        return self


class StickyTable(_Table):
    """[*.sticky]: sessions bound to a server by a cookie."""

    cookie: Annotated[str, AfterValidator(_token)] = ""
    path: Annotated[str, AfterValidator(_url_path)] = "/"
    secure: bool = True
    http_only: bool = True
    same_site: Literal["Strict", "Lax", "None"] = "Lax"
    max_age: Annotated[int, Field(ge=0)] = 0
    drain: Duration = 30.0
    idle: PositiveDuration = 5.0


class WarmUpTable(_Table):
    """[*.warm_up]: how a server that comes online gets its share."""

    duration: Duration = 120.0
    curve: Annotated[float, Field(gt=0, le=100, strict=False)] = 1.0
    floor: Annotated[Share, Field(gt=0)] = 0.1
    steps: Annotated[int, Field(ge=0, le=1000)] = 0
    starts: Literal["first-request", "healthy"] = "first-request"
    ignore_paths: Annotated[tuple[Annotated[str, AfterValidator(_url_path)], ...], Field(strict=False)] = ()
    max_cold: Annotated[Share, Field(gt=0)] = 0.5
    hold_errors: Annotated[float, Field(ge=0, le=1000, strict=False)] = 2.0
    hold_latency: Annotated[float, Field(ge=0, le=1000, strict=False)] = 3.0
    hold_requests: Annotated[int, Field(ge=1)] = 20
    hold_window: Annotated[Duration, Field(ge=1)] = 5.0
    step_back: PositiveDuration = 30.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.steps == 1:
            raise ValueError('steps = 1 is the full weight at once; write 2 or more, or duration = "0s" for no warm-up')
        if any("?" in path for path in self.ignore_paths):
            raise ValueError('ignore_paths are compared without the query; leave out "?" and what follows')
        return self


class DrainTable(_Table):
    """[*.drain]: how a server that goes offline is emptied."""

    timeout: Duration = 30.0
    on_timeout: Literal["abort", "proceed"] = "abort"
    settle: Duration = 3.0


class RolloutTable(_Table):
    """[*.rollout]: when a rollout takes the next batch."""

    ready_time: Duration = 0.0
    up_timeout: PositiveDuration = 60.0


class ProcessTable(_Table):
    """[*.process]: how a server's process is found, stopped and started. Without it Headgate signals nothing."""

    kind: Literal["gunicorn", "systemd"] = "gunicorn"
    unit: Template | None = None
    pid_file: TemplatePath | None = None
    start: Annotated[tuple[str, ...], Field(strict=False)] = ()
    directory: TemplatePath | None = None
    environment: dict[str, str] = {}
    log: TemplatePath | None = None
    graceful_timeout: Duration = 30.0
    margin: Duration = 5.0
    start_timeout: PositiveDuration = 30.0

    @model_validator(mode="after")
    def _has_unit(self) -> Self:
        if self.kind == "systemd" and self.unit is None:
            raise ValueError('kind = "systemd" needs a unit; write unit = "app@{port}.service"')
        return self


class Tables(_Table):
    """[defaults] and [upstream.NAME]: everything that can differ from one upstream to the next."""

    check: CheckTable = CheckTable()
    warm_up: WarmUpTable = WarmUpTable()
    drain: DrainTable = DrainTable()
    rollout: RolloutTable = RolloutTable()
    process: ProcessTable | None = None
    agent: AgentTable = AgentTable()
    health: HealthTable = HealthTable()
    outlier: OutlierTable = OutlierTable()
    quarantine: QuarantineTable = QuarantineTable()
    notices: NoticesTable = NoticesTable()
    balance: BalanceTable = BalanceTable()
    sticky: StickyTable = StickyTable()

    @model_validator(mode="after")
    def _one_agent(self) -> Self:
        if self.check.type == "agent" and self.agent.port:
            raise ValueError('check.type = "agent" and agent.port are two agents of one server; take one of them out')
        return self

    def policy(self) -> Policy:
        """These settings as the core takes them."""
        return Policy(
            health=HealthPolicy(
                self.check.rise,
                self.check.fall,
                **self.health.model_dump(),
                agent=self.agent.port is not None or self.check.type == "agent",
            ),
            warm_up=WarmUpPolicy(**self.warm_up.model_dump()),
            drain=DrainPolicy(**self.drain.model_dump()),
            rollout=RolloutPolicy(**self.rollout.model_dump()),
            process=ProcessPolicy(**self.process.model_dump()) if self.process else None,
            balance=BalancePolicy(**self.balance.model_dump()),
            sticky=StickyPolicy(**self.sticky.model_dump()),
            outlier=OutlierPolicy(**self.outlier.model_dump()),
            quarantine=QuarantinePolicy(**self.quarantine.model_dump()),
            notices=NoticePolicy(**self.notices.model_dump()),
        )


class Settings(_Table):
    """headgate.toml as a whole. `upstream` holds each named upstream with the defaults joined in."""

    nginx: Nginx = Nginx()
    api: Api = Api()
    readiness: Readiness = Readiness()
    store: Store = Store()
    log: Log = Log()
    defaults: Tables = Tables()
    upstream: dict[str, Tables] = {}

    @model_validator(mode="after")
    def _fits_the_plane(self) -> Self:
        if self.nginx.data_plane == "reload":
            for name, tables in {"defaults": self.defaults, **self.upstream}.items():
                place = name if tables is self.defaults else f"upstream.{name}"
                for key, set_to in (("balance.method", tables.balance.method), ("sticky.cookie", tables.sticky.cookie)):
                    if set_to:
                        raise ValueError(
                            f'{place}.{key} = "{set_to}" needs the Lua data plane; take out this, or data_plane'
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


# --- reading ----------------------------------------------------------------------------------------------------


def load(file: str | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings of `file`, else of the one that HEADGATE_CONFIG names, else of DEFAULT_FILE where it exists.

    HEADGATE_<SECTION>__<KEY> in the environment goes before the file. SettingsError tells of everything that is wrong.
    """
    named = file or environ.get("HEADGATE_CONFIG")
    path = named or DEFAULT_FILE
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if named:
            raise SettingsError(f"{path}: no such file; create it, or leave it out for the defaults") from error
        raw = {}
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; correct the path or its permissions") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}; correct the TOML there") from error
    return build(raw, environ, path)


def build(raw: Mapping[str, Any], environ: Mapping[str, str], source: str) -> Settings:
    """Validate what was read from `source`, the environment joined in; SettingsError."""
    merged = deepcopy(dict(raw))
    variables = {}
    for name, text in environ.items():
        if name.startswith("HEADGATE_") and "__" in name:
            key = tuple(name.removeprefix("HEADGATE_").lower().split("__"))
            variables[key] = name
            _set(merged, key, _value(text))
    defaults = merged.get("defaults")
    given = merged.get("upstream")
    own = given if isinstance(given, dict) else {}
    if own and isinstance(defaults, dict):
        merged["upstream"] = {name: _joined(defaults, table) for name, table in own.items()}
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        lines = []
        for each in error.errors():
            loc = tuple(str(part) for part in each["loc"])
            if not _inherited(loc, own):
                variable = next((name for key, name in variables.items() if key[: len(loc)] == loc), None)
                place = f"{'.'.join(loc)}: " if loc else ""
                lines.append(f"{variable or source}: {place}{_sentence(each, loc)}")
        raise SettingsError("\n".join(lines)) from None


def _value(text: str) -> object:
    """A variable's number, truth value or list as TOML writes it; everything else is text as it stands."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, int | float | list | dict) else text


def _set(table: dict[str, Any], key: tuple[str, ...], value: object) -> None:
    for part in key[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return  # not a table, which validation reports
    table[key[-1]] = value


def _joined(defaults: Mapping[str, Any], own: object) -> object:
    """One upstream's tables over the defaults, key by key."""
    if not isinstance(own, dict):
        return own
    joined = {**defaults, **own}
    for name, table in own.items():
        if isinstance(table, dict) and isinstance(defaults.get(name), dict):
            joined[name] = {**_fitting(defaults[name], table.get("type")), **table}
    return joined


def _fitting(table: Mapping[str, Any], kind: object) -> dict[str, Any]:
    """The defaults without what means nothing to the type of check that an upstream has instead of theirs."""
    return {key: value for key, value in table.items() if kind is None or kind in _BELONGS.get(key, (kind,))}


def _inherited(loc: tuple[str, ...], own: Mapping[str, Any]) -> bool:
    """Whether this error of an upstream is one of the defaults, which is reported there."""
    table: object = own.get(loc[1]) if loc[:1] == ("upstream",) and len(loc) > 2 else None
    for part in loc[2:4]:
        if not isinstance(table, dict):
            return False
        if part not in table:
            return True
        table = table[part]
    return False


def _sentence(error: ErrorDetails, loc: tuple[str, ...]) -> str:
    """What is wrong, and the remedy."""
    match error["type"]:
        case "extra_forbidden":
            known = sorted(_model_at(loc[:-1]).model_fields)
            near = difflib.get_close_matches(loc[-1], known, 1)
            return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; known are {', '.join(known)}"
        case "value_error":
            return str(error["ctx"]["error"])
        case "model_type" | "dict_type":
            return f"must be a table; write [{'.'.join(loc)}]"
        case "literal_error":
            return f"{error['input']!r} is not known; write {error['ctx']['expected']}"
        case "string_type":
            return "must be text; put it in quotes"
        case "int_type":
            return "must be a whole number; write it without quotes"
        case "bool_type":
            return "must be true or false; write it without quotes"
        case "tuple_type":
            return 'must be a list; write ["…", "…"]'
        case _:
            problem = error["msg"].removeprefix("Input should be ")
            return f"{error['input']!r} does not fit; it should be {problem[:1].lower()}{problem[1:]}"


def _model_at(loc: tuple[str, ...]) -> type[BaseModel]:
    """The table of the schema that stands at this path."""
    model: type[BaseModel] = Settings
    for part in ("defaults", *loc[2:]) if loc[:1] == ("upstream",) else loc:
        annotation = model.model_fields[part].annotation
        model = next(each for each in (annotation, *get_args(annotation)) if isinstance(each, type))
    return model
