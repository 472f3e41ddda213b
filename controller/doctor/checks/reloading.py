"""Traps of nginx itself: can it be read, how does this version reload, does it run what its files say."""

from __future__ import annotations

from collections.abc import Iterator

from controller.doctor.model import Facts, Found, Severity, check
from controller.settings.tables import OutlierTable, StickyTable

_PCRE2_LEAK = ((1, 21, 5), (1, 25, 3))
_TRUNCATION = ((1, 17, 5), (1, 23, 1))
_HTTP2_STAYS = ((1, 9, 5), (1, 27, 1))
_LUA_ONLY = {
    "outlier": frozenset(OutlierTable.model_fields),
    "warm_up": frozenset({"ignore_paths", "hold_errors", "hold_latency", "hold_requests", "hold_window", "step_back"}),
    "quarantine": frozenset({"marks"}),
    "sticky": frozenset(StickyTable.model_fields),
    "balance": frozenset({"bound"}),
    "rollout": frozenset({"max_errors", "max_latency", "min_requests", "window"}),
}  # by table
_MIN_TIMEOUT = (1, 27, 4)  # the first version with keepalive_min_timeout


@check("unseen", Severity.HINT)
def unseen(facts: Facts) -> Iterator[Found]:
    """Something could not be looked at, so that nothing is known about it."""
    yield from facts.unseen


@check("conf-broken", Severity.SEVERE)
def broken(facts: Facts) -> Iterator[Found]:
    """nginx.conf cannot be read: a reload is refused and the old workers go on, and after a stop nginx stays away."""
    if error := facts.broken:
        evidence = str(error.place or facts.settings.nginx.conf)
        message = str(error).removesuffix(f" in {error.place}")
        yield Found("nginx", evidence, message, "correct it and see what `nginx -t` says")


@check("worker-shutdown-timeout", Severity.WARNING)
def worker_shutdown_timeout(facts: Facts) -> Iterator[Found]:
    """Nothing ends the old workers of a reload, which WebSockets and event streams hold for ever."""
    if any(facts.conf.find("http")) and not facts.conf.own("worker_shutdown_timeout"):
        yield Found(
            "nginx",
            str(facts.conf.place.file),
            "worker_shutdown_timeout is not set: a WebSocket or an event stream holds its old worker after each reload",
            "write `worker_shutdown_timeout 10m;` (longer than any request) at the top level",
            _at_reload(facts),
        )


@check("nginx-leak", Severity.WARNING)
def leak(facts: Facts) -> Iterator[Found]:
    """This nginx (1.21.5 to 1.25.2) leaks memory at each reload when it is built with PCRE2."""
    yield from _bug(facts, _PCRE2_LEAK, "leaks memory at each reload (PCRE2; mended in 1.25.3)")


@check("nginx-truncation", Severity.WARNING)
def truncation(facts: Facts) -> Iterator[Found]:
    """This nginx (1.17.5 to 1.23.0) may truncate a proxied response during a reload."""
    yield from _bug(facts, _TRUNCATION, "may truncate a proxied response during a reload (mended in 1.23.1)")


@check("http2-stays", Severity.WARNING)
def http2_stays(facts: Facts) -> Iterator[Found]:
    """Before 1.27.1 new HTTP/2 connections may ignore that their worker shuts down."""
    listening = (node for node in facts.conf.find("listen") if "http2" in node.args[1:])
    switched = (node for node in facts.conf.find("http2") if node.args == ("on",))
    for node in [*listening, *switched][:1]:
        what = "may keep new HTTP/2 connections on workers that shut down (mended in 1.27.1)"
        yield from _bug(facts, _HTTP2_STAYS, what, str(node.place))


@check("reload-closes-clients", Severity.HINT)
def reload_closes_clients(facts: Facts) -> Iterator[Found]:
    """On the reload plane each reload closes clients' keep-alive connections, some with a request on its way."""
    http = facts.conf.own("http")
    if facts.reloads and not any(http[0].find("keepalive_min_timeout") if http else ()):
        newer = not facts.nginx or facts.nginx.version >= _MIN_TIMEOUT
        yield Found(
            "nginx",
            facts.setting("nginx.data_plane"),
            "each reload closes keep-alive connections of clients, and requests that are on their way there fail",
            'write `keepalive_min_timeout 5s;` in http{}, or use data_plane = "lua"'
            if newer
            else 'use data_plane = "lua", or an nginx from 1.27.4 on with `keepalive_min_timeout 5s;`',
        )


@check("reload-ignores", Severity.HINT)
def reload_ignores(facts: Facts) -> Iterator[Found]:
    """Settings that only the Lua plane can follow are set on the reload plane, where they have no effect."""
    if not facts.reloads:
        return
    defaults = facts.settings.defaults
    for place, tables in {"defaults": defaults, **facts.settings.upstream}.items():
        where = place if tables is defaults else f"upstream.{place}"
        for name, keys in _LUA_ONLY.items():
            table, inherited = getattr(tables, name), getattr(defaults, name)
            given = [key for key in sorted(table.model_fields_set & keys) if getattr(table, key)]
            if tables is not defaults:
                given = [key for key in given if getattr(table, key) != getattr(inherited, key)]
            if given:
                yield Found(
                    place,
                    facts.setting(", ".join(f"{where}.{name}.{key}" for key in given)),
                    f"{', '.join(given)} of [{where}.{name}] have no effect: plain nginx tells nothing of its answers",
                    'take them out, or use data_plane = "lua"',
                )


@check("old-workers", Severity.WARNING)
def old_workers(facts: Facts) -> Iterator[Found]:
    """More workers shut down than serve: reloads come faster than old workers end, and memory goes with them."""
    if facts.master is None:
        return
    leaving = [worker.pid for worker in facts.master.workers if worker.leaving]
    serving = len(facts.master.workers) - len(leaving)
    if len(leaving) > serving:
        yield Found(
            "nginx",
            f"pid {min(leaving)}",
            f"{len(leaving)} workers of earlier reloads have not ended; {serving} serve",
            "reload less often, set worker_shutdown_timeout, and see what holds them: `ss -tnp | grep pid=PID`",
        )


@check("not-loaded", Severity.WARNING)
def not_loaded(facts: Facts) -> Iterator[Found]:
    """Files were changed and nginx has not reloaded since, or its reload failed: it does not run what they say."""
    for path in facts.changed[:3]:
        more = f" (and {len(facts.changed) - 3} more)" if len(facts.changed) > 3 and path == facts.changed[2] else ""
        yield Found(
            "nginx",
            path + more,
            "was written after nginx's newest worker began",
            "run `nginx -t`, then reload; if you did, the error log says why it was refused",
        )


@check("nginx-replaced", Severity.WARNING)
def replaced(facts: Facts) -> Iterator[Found]:
    """nginx was upgraded on disk and the old program still runs: a reload loads new modules into the old program."""
    if facts.master and facts.master.replaced:
        yield Found(
            "nginx",
            f"pid {facts.master.pid}",
            "runs a program that is no longer on disk; a reload fails when the modules on disk are of another version",
            "restart nginx, or upgrade it in place: USR2, then QUIT to the old master",
        )


@check("pid-file", Severity.WARNING)
def pid_file(facts: Facts) -> Iterator[Found]:
    """A pid file names a process that is gone or is another one: whoever signals by it hits nothing, or a stranger."""
    for file in facts.pid_files:
        if not file.fits:
            holds = "holds no pid" if file.pid is None else f"names pid {file.pid}"
            state = "" if file.pid is None else ", which is another program" if file.alive else ", which is gone"
            yield Found(file.path, file.path, holds + state, "remove the file, and see who writes it")


def _at_reload(facts: Facts) -> Severity:
    """How grave a trap of reloads is: with the Lua plane they are as rare as the operator makes them."""
    return Severity.WARNING if facts.reloads else Severity.HINT


def _bug(
    facts: Facts, versions: tuple[tuple[int, ...], tuple[int, ...]], what: str, evidence: str = ""
) -> Iterator[Found]:
    if facts.nginx and versions[0] <= facts.nginx.version < versions[1]:
        running = f"pid {facts.master.pid}" if facts.master else "nginx -V"
        remedy = "upgrade nginx (nginx.org has packages), or reload seldom; the Lua plane needs no reload"
        yield Found(facts.nginx.name, evidence or running, what, remedy, _at_reload(facts))
