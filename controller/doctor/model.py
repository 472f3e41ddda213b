"""What the doctor knows and what it says: facts, findings and checks, as values.

Only values and their small derived properties belong here; facts.py gathers them, the checks read them.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from controller.conf.parse import ConfSyntaxError, UpstreamBlock
from controller.conf.tree import EMPTY, Node, calls
from controller.core.model import Server
from controller.core.policy import ProcessPolicy
from controller.settings import DEFAULT_FILE, Settings

# --- facts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Nginx:
    """A build of nginx as `nginx -V` tells of it."""

    version: tuple[int, ...]
    arguments: str = ""
    flavour: str = "nginx"

    @property
    def name(self) -> str:
        """`nginx 1.22.1`."""
        return f"{self.flavour} {'.'.join(map(str, self.version))}"


@dataclass(frozen=True, slots=True)
class NginxWorker:
    """A worker process; `created` in seconds since the epoch, `leaving` while it shuts down."""

    pid: int
    created: float
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class NginxMaster:
    """The running nginx. `replaced`: its program on disk is not the one that it runs any more."""

    pid: int
    workers: tuple[NginxWorker, ...] = ()
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class PidFile:
    """A pid file: what it names (None: no number), whether that lives, and whether it is what the file is for."""

    path: str
    pid: int | None
    alive: bool = False
    fits: bool = False


@dataclass(frozen=True, slots=True)
class App:
    """A gunicorn, or a uvicorn on its own: a running one, or the command that would start it.

    `where` is `pid N` or the setting that holds the command. `known` holds gunicorn's settings by their names, as far
    as they can be seen; times in seconds. `uvicorn`: its workers are uvicorn's; None where that cannot be seen.
    `keep_alive`: seconds that an idle connection stays open, 0 where each response ends it, None where that cannot be
    seen. `own_graceful`: the workers' `timeout_graceful_shutdown`, infinite where its value cannot be seen, None
    without one. `unit`: the service of systemd that it runs in.
    """

    where: str
    serves: tuple[tuple[str, Server], ...]
    known: Mapping[str, object] = field(default_factory=dict)
    uvicorn: bool | None = False
    keep_alive: float | None = None
    own_graceful: float | None = None
    unit: str = ""

    def number(self, name: str) -> float | None:
        """A setting that is a number; None where it cannot be seen."""
        value = self.known.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def subject(self) -> str:
        """Upstream and addresses that it serves."""
        names = dict.fromkeys(name for name, _ in self.serves)
        return f"{', '.join(names)}: {', '.join(dict.fromkeys(server.address for _, server in self.serves))}"


@dataclass(frozen=True, slots=True)
class PathFact:
    """A file, directory or socket. `mode` None: it is not there. `open`: others may enter every directory above it."""

    path: str
    mode: int | None = None
    open: bool = False
    writable: bool = False


class Found(NamedTuple):
    """What a check says: about whom, where one can see it, what is so, what helps. `severity` where it is milder."""

    subject: str
    evidence: str
    message: str
    remedy: str
    severity: Severity | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the checks look at.

    `paths` and `units` (systemd's properties) are by name. `servers` are those of this machine; `unfit` those whose
    process cannot be driven: upstream, server, why, remedy. `ephemeral` are the ports of outgoing connections; `unseen`
    what could not be looked at; `changed` the configuration files that were written after the newest worker began.
    """

    settings: Settings = field(default_factory=Settings)
    settings_file: str = DEFAULT_FILE
    conf: Node = EMPTY
    upstreams: tuple[UpstreamBlock, ...] = ()
    broken: ConfSyntaxError | None = None
    nginx: Nginx | None = None
    master: NginxMaster | None = None
    changed: tuple[str, ...] = ()
    servers: tuple[tuple[str, Server], ...] = ()
    apps: tuple[App, ...] = ()
    unfit: tuple[tuple[str, Server, str, str], ...] = ()
    pid_files: tuple[PidFile, ...] = ()
    units: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    paths: Mapping[str, PathFact] = field(default_factory=dict)
    ephemeral: Collection[int] = ()
    somaxconn: int | None = None
    unseen: tuple[Found, ...] = ()

    @property
    def reloads(self) -> bool:
        """Whether Headgate works by reloading nginx."""
        plane: str = self.settings.nginx.data_plane
        return plane == "reload"

    def process(self, upstream: str) -> ProcessPolicy | None:
        """How Headgate drives this upstream's processes."""
        return self.settings.policy_for(upstream).process

    def setting(self, key: str) -> str:
        """Evidence that stands in headgate.toml."""
        return f"{self.settings_file}: {key}"

    def blocks(self) -> Iterator[tuple[UpstreamBlock, Node]]:
        """The upstreams of http, each with its directives."""
        nodes = {node.place: node for http in self.conf.own("http") for node in http.own("upstream")}
        return ((block, nodes[block.place]) for block in self.upstreams if block.place in nodes)

    def hooks(self) -> Iterator[tuple[UpstreamBlock, Node, Node]]:
        """The upstreams that call headgate, each with its directives and the hook."""
        for block, node in self.blocks():
            for hook in node.own(*lua_directives("balancer")):
                if hook.lua is not None and calls(hook.lua, "balance"):
                    yield block, node, hook

    def proxies(self) -> Iterator[tuple[UpstreamBlock, Node]]:
        """Every `proxy_pass` and its like that leads to an upstream by name."""
        blocks = {block.name.lower(): block for block in self.upstreams}
        for target, node in self._passes():
            if target in blocks:
                yield blocks[target], node

    def variable_proxies(self) -> Iterator[Node]:
        """Every `proxy_pass` and its like that leads where a variable says, which may be any upstream."""
        return (node for target, node in self._passes() if "$" in target)

    def _passes(self) -> Iterator[tuple[str, Node]]:
        for node in self.conf.find(*(f"{kind}_pass" for kind in ("proxy", "grpc", "fastcgi", "uwsgi", "scgi"))):
            yield node.args[0].rpartition("://")[2].partition("/")[0].lower() if node.args else "", node


def is_address(host: str) -> bool:
    """Whether a host is an IP address and no name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def lua_directives(phase: str) -> tuple[str, str, str]:
    """The directives that run Lua in a phase."""
    return f"{phase}_by_lua_block", f"{phase}_by_lua_file", f"{phase}_by_lua"


# --- findings ---------------------------------------------------------------------------------------------------


class Severity(enum.StrEnum):
    """severe: requests are lost, or Headgate cannot work; warning: so it is under some conditions; hint: know it."""

    SEVERE = "severe"
    WARNING = "warning"
    HINT = "hint"


@dataclass(frozen=True, slots=True)
class Finding:
    """One trap in this very set-up."""

    check: str
    severity: Severity
    subject: str
    evidence: str
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Check:
    """One trap that is looked for. `severity` is the gravest that it can be; `sentence` says when it is found."""

    id: str
    severity: Severity
    sentence: str
    find: Callable[[Facts], Iterator[Found]]


def check(name: str, severity: Severity) -> Callable[[Callable[[Facts], Iterator[Found]]], Check]:
    """Make a check of a function; its docstring is the sentence."""
    return lambda find: Check(name, severity, find.__doc__ or "", find)
