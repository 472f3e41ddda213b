"""Traps of nginx's own balancing, which also serves when Headgate has no table there."""

from __future__ import annotations

from collections.abc import Iterator

from controller.conf import variables
from controller.conf.parse import UpstreamBlock
from controller.conf.tree import Node
from controller.doctor.model import Facts, Found, Severity, check, is_address


@check("last-survivor", Severity.SEVERE)
def last_survivor(facts: Facts) -> Iterator[Found]:
    """All siblings of a server are `down` and it has max_fails: one failure takes the whole upstream away."""
    for block, _ in _native(facts):
        living = [line for line in block.servers if not line.down]
        if len(block.servers) > 1 and len(living) == 1 and living[0].max_fails:
            last = living[0]
            yield Found(
                f"{block.name}: {last.address}",
                str(last.place),
                f"it is the last one that is not down, and {last.max_fails} failure(s) make nginx answer 502 to all "
                f"for {last.fail_timeout:g} s",
                "write max_fails=0 on it while its siblings are down",
            )


@check("hash-remaps", Severity.HINT)
def hash_remaps(facts: Facts) -> Iterator[Found]:
    """ip_hash, or hash without `consistent`: a changed weight or a removed server moves nearly every client."""
    for block, node in _native(facts):
        for method in node.own("ip_hash", "hash"):
            if "consistent" not in method.args:
                yield Found(
                    block.name,
                    str(method.place),
                    f"{method.name} gives nearly every client another server when a weight changes or a line goes",
                    f"write `hash {' '.join(method.args) or '$remote_addr'} consistent;`, and "
                    "mark a server `down` instead of removing it",
                )


@check("hash-no-ramp", Severity.WARNING)
def hash_no_ramp(facts: Facts) -> Iterator[Found]:
    """A hash on the reload plane: weights stay as they are there, and a cold server gets its full share at once."""
    for block, node in _native(facts):
        warm_up = facts.settings.policy_for(block.name).warm_up.duration
        for method in node.own("ip_hash", "hash") if facts.reloads and block.name in facts.settings.upstream else ():
            if warm_up > 0:
                yield Found(
                    block.name,
                    str(method.place),
                    f"under {method.name} the reload plane leaves the weights alone, so a server that comes online "
                    f"gets its full share at once, the warm-up of {warm_up:g} s notwithstanding",
                    f'choose data_plane = "lua", or write duration = "0s" in [upstream.{block.name}.warm_up]',
                )


@check("hash-key", Severity.WARNING)
def hash_key(facts: Facts) -> Iterator[Found]:
    """headgate.toml hashes a variable that nginx does not know: it is always empty, so it places no request."""
    for block, *_ in facts.hooks():
        own = facts.settings.upstream.get(block.name)
        for name in variables.names(facts.settings.policy_for(block.name).balance.key):
            if not variables.known(name, facts.conf):
                yield Found(
                    block.name,
                    facts.setting(f"{f'upstream.{block.name}' if own else 'defaults'}.balance.key"),
                    f"${name} is no variable of nginx's own, and nginx.conf neither defines nor uses it: it is empty",
                    "correct its name, or define it in nginx.conf, with `map` or `set`",
                )


@check("bound-idle", Severity.WARNING)
def bound_idle(facts: Facts) -> Iterator[Found]:
    """headgate.toml bounds the load of an upstream whose method in nginx.conf is no consistent hash: in vain."""
    for block, *_ in facts.hooks():
        own = facts.settings.upstream.get(block.name)
        if not own or own.balance.method or own.balance.bound in (0, facts.settings.defaults.balance.bound):
            continue
        if block.method != "hash" or "consistent" not in block.method_args:
            yield Found(
                block.name,
                facts.setting(f"upstream.{block.name}.balance.bound"),
                f"bound = {own.balance.bound:g} goes with a consistent hash, and this upstream has "
                f"{' '.join((block.method, *block.method_args)) or 'round robin'}",
                f'write method = "hash" and a key in [upstream.{block.name}.balance], or take bound out',
            )


@check("burst", Severity.HINT)
def burst(facts: Facts) -> Iterator[Found]:
    """least_conn or random two: a server that comes online has no connections, so it gets everything new at first."""
    for block, node in _native(facts):
        for method in node.own("least_conn", "random"):
            if method.name == "least_conn" or method.args[:1] == ("two",):
                yield Found(
                    block.name,
                    str(method.place),
                    f"with {' '.join((method.name, *method.args))} a server that comes online gets a burst: it has the "
                    "fewest connections",
                    "let it warm up with a small weight, or use round robin",
                )


@check("lone-warm-up", Severity.HINT)
def lone_warm_up(facts: Facts) -> Iterator[Found]:
    """An upstream with a single server has a warm-up, which cannot slow anything: there is nobody else."""
    for block, *_ in facts.hooks():
        duration = facts.settings.policy_for(block.name).warm_up.duration
        only = block.servers[0]
        if duration and len(block.servers) == 1 and (only.unix or is_address(only.host)):
            yield Found(
                block.name,
                str(only.place),
                f"its only server gets everything at once, the warm-up of {duration:g} s notwithstanding",
                f'add a server, or write duration = "0s" in [upstream.{block.name}.warm_up]',
            )


@check("probe-timeout", Severity.WARNING)
def probe_timeout(facts: Facts) -> Iterator[Found]:
    """A probe may take as long as the interval: where servers are slow, one follows the other without a pause."""
    defaults = facts.settings.defaults.check
    tables = {"defaults": defaults} | {
        f"upstream.{name}": each.check for name, each in facts.settings.upstream.items() if each.check != defaults
    }
    for key, table in tables.items():
        if table.timeout >= table.interval:
            yield Found(
                key.removeprefix("upstream."),
                facts.setting(f"{key}.check.timeout"),
                f"timeout and interval of the probes are both {table.timeout:g} s",
                "make timeout at most half of interval",
            )


@check("ephemeral-port", Severity.WARNING)
def ephemeral_port(facts: Facts) -> Iterator[Found]:
    """A server's port is one that the kernel gives to outgoing connections: a restart may find it taken."""
    for name, server in facts.servers:
        if server.port in facts.ephemeral:
            where = str(server.place) if server.place else server.address
            yield Found(
                f"{name}: {server.address}",
                where,
                f"port {server.port} lies in net.ipv4.ip_local_port_range; an outgoing connection may hold it when the "
                "server starts again",
                f"choose a port below, or add {server.port} to net.ipv4.ip_local_reserved_ports",
            )


def _native(facts: Facts) -> Iterator[tuple[UpstreamBlock, Node]]:
    """The upstreams that nginx balances by itself."""
    hooked = {block.name for block, *_ in facts.hooks()}
    return ((block, node) for block, node in facts.blocks() if block.name not in hooked)
