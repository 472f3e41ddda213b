"""Traps between nginx and the servers: kept connections, and what happens when a try fails."""

from __future__ import annotations

from collections.abc import Iterator

from controller.conf.tree import Node, seconds
from controller.doctor.model import Facts, Found, Severity, check

_KEPT_BY_DEFAULT = (1, 29, 7)  # from this version on upstream connections are kept, with HTTP/1.1, unless configured


@check("upstream-keepalive", Severity.SEVERE)
def upstream_keepalive(facts: Facts) -> Iterator[Found]:
    """nginx keeps idle connections at least as long as the server does: it re-uses closed ones, and a POST gets 502."""
    for block, node in facts.blocks():
        kept = _kept(facts, node)
        if kept is None:
            continue
        timeout = next(iter(node.own("keepalive_timeout")), None)
        limit = 60.0 if timeout is None else seconds(" ".join(timeout.args))
        if limit is None:
            continue
        evidence = str((timeout or kept).place)
        apps = [app for app in facts.apps if block.name in dict(app.serves)]
        seen = [app for app in apps if app.keep_alive is not None]
        for app in seen:
            if app.keep_alive and limit >= app.keep_alive:
                yield Found(
                    app.subject,
                    f"{evidence}, {app.where}",
                    f"nginx keeps idle connections for {limit:g} s, the server for {app.keep_alive:g} s",
                    f"give the server a longer one (gunicorn --keep-alive {limit + 15:g}, uvicorn "
                    f"--timeout-keep-alive {limit + 15:g}), or write `keepalive_timeout {_below(app.keep_alive)};` "
                    "in the upstream",
                )
        if not seen and limit >= 2:
            yield Found(
                block.name,
                evidence,
                f"nginx keeps idle connections for {limit:g} s, and the servers' own limit cannot be seen; by default "
                "gunicorn closes them after 2 s, uvicorn after 5 s",
                "make sure that the servers keep them longer than nginx does",
                Severity.HINT,
            )


@check("keepalive-ineffective", Severity.WARNING)
def keepalive_ineffective(facts: Facts) -> Iterator[Found]:
    """An upstream has `keepalive`, and a location that leads there speaks HTTP/1.0 or sends `Connection: close`."""
    if facts.nginx and facts.nginx.version >= _KEPT_BY_DEFAULT:
        return
    keeping = {block.name for block, node in facts.blocks() if _kept(facts, node)}
    for block, proxy in facts.proxies():
        if proxy.name != "proxy_pass" or block.name not in keeping:
            continue
        version = [node.args for node in proxy.inherited("proxy_http_version")]
        headers = {node.args[0].lower(): node.args[-1] for node in proxy.inherited("proxy_set_header") if node.args}
        connection = headers.get("connection", "close").lower()
        if version in ([], [("1.0",)]):
            problem = "it speaks HTTP/1.0, with which no connection is kept"
        elif "connection" in headers and connection != "close":
            continue
        elif headers and "connection" not in headers:
            problem = "its own proxy_set_header lines hide the inherited ones, so it sends `Connection: close`"
        else:
            problem = "it sends `Connection: close`"
        yield Found(
            block.name,
            str(proxy.place),
            f"the upstream's keepalive has no effect here: {problem}",
            'write `proxy_http_version 1.1;` and `proxy_set_header Connection "";` beside the other proxy_set_header',
        )


@check("post-not-retried", Severity.HINT)
def post_not_retried(facts: Facts) -> Iterator[Found]:
    """A POST that was sent to a server which then fails is not tried elsewhere."""
    for block, proxy, conditions, _ in _failing_over(facts):
        if "non_idempotent" not in conditions:
            yield Found(
                block,
                str(proxy.place),
                "a POST, LOCK or PATCH that a server may have seen is not tried on another one when that server fails",
                "leave it so, unless the application bears the same POST twice: then add non_idempotent to "
                f"{proxy.name.removesuffix('_pass')}_next_upstream",
            )


@check("tries-unlimited", Severity.WARNING)
def tries_unlimited(facts: Facts) -> Iterator[Found]:
    """One request may be tried on every server of an upstream: what fails one fails them all, an avalanche."""
    for block, proxy, _, servers in _failing_over(facts):
        kind = proxy.name.removesuffix("_pass")
        tries = [node.args for node in proxy.inherited(f"{kind}_next_upstream_tries")]
        if servers > 2 and tries in ([], [("0",)]):
            yield Found(
                block,
                str(proxy.place),
                f"a request that fails is tried on up to {servers} servers, each time with the full timeout",
                f"write `{kind}_next_upstream_tries 2;` and `{kind}_next_upstream_timeout 5s;`",
            )


@check("auth-by-upstream", Severity.WARNING)
def auth_by_upstream(facts: Facts) -> Iterator[Found]:
    """A subrequest (auth_request, mirror) goes to a managed upstream and its end is not counted."""
    managed = {block.name for block, _, _ in facts.hooks()}
    for node in facts.conf.find("auth_request", "mirror"):
        server = node.within("server")
        location = _location(server, node.args[0]) if server and node.args else None
        if location is None:
            continue
        for block, proxy in facts.proxies():
            if (
                proxy.within("location") is location
                and block.name in managed
                and [each.args for each in proxy.inherited("log_subrequest")] != [("on",)]
            ):
                yield Found(
                    block.name,
                    f"{node.place}, {location.place}",
                    f"{node.name} sends subrequests there: each counts as in flight until its request ends, and a "
                    "failure of it is not seen",
                    "write `log_subrequest on;` and `access_log off;` in the subrequest's location",
                )


def _kept(facts: Facts, upstream: Node) -> Node | None:
    """The directive by which nginx keeps connections to an upstream; the upstream itself where it is the default."""
    directives = [node for node in upstream.own("keepalive") if node.args]
    if directives:
        return directives[0] if directives[0].args[0] != "0" else None
    return upstream if facts.nginx and facts.nginx.version >= _KEPT_BY_DEFAULT else None


def _below(keep_alive: float) -> str:
    return f"{keep_alive / 2 * 1000:g}ms" if keep_alive < 2 else f"{keep_alive / 2:.0f}s"


def _failing_over(facts: Facts) -> Iterator[tuple[str, Node, tuple[str, ...], int]]:
    """The first proxy that leads to each upstream of several servers in each way: name, proxy, conditions, servers."""
    told = set()
    for block, proxy in facts.proxies():
        kind = proxy.name.removesuffix("_pass")
        conditions = tuple(word for node in proxy.inherited(f"{kind}_next_upstream") for word in node.args)
        tries = tuple(node.args for node in proxy.inherited(f"{kind}_next_upstream_tries"))
        serving = sum(not line.down for line in block.servers)
        if serving > 1 and conditions != ("off",) and (block.name, conditions, tries) not in told:
            told.add((block.name, conditions, tries))
            yield block.name, proxy, conditions, serving


def _location(server: Node, uri: str) -> Node | None:
    """Where a literal URI ends up; regular expressions are not followed."""
    prefixes = [node for node in server.own("location") if node.args and node.args[0] not in ("~", "~*")]
    exact = [node for node in prefixes if node.args == ("=", uri)]
    matching = [node for node in prefixes if node.args[0] != "=" and uri.startswith(node.args[-1])]
    return next(iter([*exact, *sorted(matching, key=lambda node: -len(node.args[-1]))]), None)
