"""Traps of the Lua data plane: hooks that are not what they seem, parts that are missing, doors that stand open."""

from __future__ import annotations

import os.path
import re
import stat
from collections.abc import Iterator

from controller.conf.tree import Node, calls, size
from controller.doctor.model import Facts, Found, Severity, check, lua_directives

_BYTES_A_SERVER = 300  # of a table in its shared dict (docs/data-plane.md)
_BYTES_BESIDE = 65536


@check("not-adopted", Severity.HINT)
def not_adopted(facts: Facts) -> Iterator[Found]:
    """No upstream calls Headgate: nginx balances all of them by itself."""
    if not facts.reloads and facts.upstreams and not any(facts.hooks()):
        names = ", ".join(block.name for block in facts.upstreams[:3])
        more = f" and {len(facts.upstreams) - 3} more" if len(facts.upstreams) > 3 else ""
        evidence = str(facts.upstreams[0].place)
        yield Found("nginx", evidence, f"no upstream has a hook: {names}{more}", "see `headgate adopt --diff`")


@check("hook-name", Severity.SEVERE)
def hook_name(facts: Facts) -> Iterator[Found]:
    """A hook names another upstream than the one that it stands in, so requests go to the wrong servers or nowhere."""
    for block, _, hook in facts.hooks():
        named = _named(hook)
        if named != block.name:
            yield Found(
                block.name,
                str(hook.place),
                f'its hook asks for "{named}"' if named else "its hook names no upstream",
                f'write require("headgate").balance("{block.name}")',
            )


@check("hook-zone", Severity.SEVERE)
def hook_zone(facts: Facts) -> Iterator[Found]:
    """A `zone` stands in an upstream with the hook; a Lua balancer does not work with it."""
    for block, node, _ in facts.hooks():
        for zone in node.own("zone"):
            yield Found(block.name, str(zone.place), "a Lua balancer does not work with zone", "take out the zone")


@check("hook-order", Severity.SEVERE)
def hook_order(facts: Facts) -> Iterator[Found]:
    """The hook stands behind `keepalive`, before which a balancer must stand; connections are then not kept."""
    for block, node, hook in facts.hooks():
        for keepalive in node.own("keepalive"):
            directives = node.block or []
            if directives.index(keepalive) < directives.index(hook):
                yield Found(
                    block.name,
                    f"{hook.place}, keepalive in {keepalive.place}",
                    "the hook stands behind keepalive, which then has no effect",
                    "put the hook behind the server lines and before keepalive",
                )


@check("unmanaged", Severity.WARNING)
def unmanaged(facts: Facts) -> Iterator[Found]:
    """An upstream has the hook, and something that keeps Headgate from managing it: nginx balances it by itself."""
    for block, node, hook in facts.hooks():
        if block.obstacle and _named(hook) == block.name and not node.own("zone"):
            place, _, told = block.obstacle.partition(": ")
            message, _, remedy = told.rpartition("; ")
            yield Found(block.name, place, message or told, remedy if message else "take it out, or take out the hook")


@check("plane-incomplete", Severity.SEVERE)
def plane_incomplete(facts: Facts) -> Iterator[Found]:
    """Upstreams have hooks, and a part of nginx/headgate.conf that they need is not included."""
    hook = next(facts.hooks(), None)
    if hook is None:
        return
    missing = [name for name in ("headgate_table", "headgate_state") if not _dicts(facts, name)]
    missing += [
        f"{phase}_by_lua"
        for phase in ("init", "init_worker", "log")
        if not list(facts.conf.find(*lua_directives(phase)))
    ]
    if not any(_controls(facts)):
        missing.append("the control server")
    if missing:
        yield Found(
            "nginx",
            str(hook[2].place),
            f"the hook needs what is not configured: {', '.join(missing)}",
            "include the output of `headgate include` in http{}",
        )


@check("lua-missing", Severity.SEVERE)
def lua_missing(facts: Facts) -> Iterator[Found]:
    """Upstreams have hooks, and nginx has no Lua module: it refuses this configuration."""
    hook = next(facts.hooks(), None)
    if hook is None or facts.nginx is None or "lua" in facts.nginx.arguments or facts.nginx.flavour == "openresty":
        return
    if not any("ngx_http_lua_module" in node.args[0] for node in facts.conf.own("load_module") if node.args):
        yield Found(
            facts.nginx.name,
            str(hook[2].place),
            "no load_module loads the Lua module that the hook needs",
            "install libnginx-mod-http-lua and lua-resty-core (Debian), and load ndk_http_module and "
            'ngx_http_lua_module; or use data_plane = "reload"',
        )


@check("own-init", Severity.SEVERE)
def own_init(facts: Facts) -> Iterator[Found]:
    """An init_by_lua or init_worker_by_lua of your own stands in http{}: in Headgate's place, or nginx refuses both."""
    if not any(facts.hooks()):
        return
    for phase in ("init", "init_worker"):
        nodes = [node for http in facts.conf.own("http") for node in http.own(*lua_directives(phase))]
        for node in nodes:
            if node.lua is not None and not calls(node.lua, phase):
                yield Found(
                    "nginx",
                    str(node.place),
                    f"{node.name} stands beside Headgate's, and nginx takes only one"
                    if len(nodes) > 1
                    else f"{node.name} stands in the place of Headgate's and does not call it",
                    f'call require("headgate").{phase} there as the output of `headgate include` does, and leave that '
                    "line out of the include",
                )


@check("hidden-log", Severity.SEVERE)
def hidden_log(facts: Facts) -> Iterator[Found]:
    """A log_by_lua of a server or location hides Headgate's: requests there stay in flight for ever; no drain ends."""
    managed = {block.name for block, *_ in facts.hooks()}
    leading = [(block.name, proxy) for block, proxy in facts.proxies() if block.name in managed]
    leading += [("any upstream", proxy) for proxy in facts.variable_proxies() if managed]
    for name, proxy in leading:
        for log in proxy.inherited(*lua_directives("log")):
            if log.lua is None or not calls(log.lua, "log"):
                seen = log.lua is not None
                yield Found(
                    name,
                    str(log.place),
                    f"{log.name} hides Headgate's, so requests of this location never end in its counts"
                    if seen
                    else f"{log.name} hides Headgate's, and its file cannot be read here",
                    'call require("headgate").log() in it, too',
                    None if seen else Severity.HINT,
                )


@check("plane-paths", Severity.SEVERE)
def plane_paths(facts: Facts) -> Iterator[Found]:
    """nginx's control socket or snapshot is another one than headgate.toml says: the daemon does not reach it."""
    nginx = facts.settings.nginx
    for listen in _controls(facts):
        if listen.args[0] != f"unix:{nginx.control}":
            yield Found(
                "nginx",
                f"{listen.place}, {facts.setting('nginx.control')}",
                f"nginx takes tables on {listen.args[0]}, the daemon sends them to unix:{nginx.control}",
                "include the output of `headgate include` anew, or correct nginx.control",
            )
    for init in facts.conf.find(*lua_directives("init")) if any(facts.hooks()) else ():
        snapshot = re.search(r"""snapshot\s*=\s*(["'])(.*?)\1""", init.lua or "")
        if snapshot and calls(init.lua or "", "init") and snapshot[2] != nginx.snapshot:
            yield Found(
                "nginx",
                f"{init.place}, {facts.setting('nginx.snapshot')}",
                f"nginx loads {snapshot[2]} when it starts, the daemon writes {nginx.snapshot}",
                "include the output of `headgate include` anew, or correct nginx.snapshot",
            )


@check("dict-size", Severity.SEVERE)
def dict_size(facts: Facts) -> Iterator[Found]:
    """The shared dict for tables is too small for two tables of these servers: nginx will refuse them."""
    servers = sum(len(block.servers) for block, *_ in facts.hooks())
    needed = 2 * _BYTES_A_SERVER * servers + _BYTES_BESIDE
    for node in _dicts(facts, "headgate_table") if servers else ():
        given = size(node.args[1])
        if given is not None and given < needed:
            yield Found(
                "nginx",
                str(node.place),
                f"headgate_table has {node.args[1]}; two tables of {servers} servers need {-(-needed // 1024)}k",
                "write `lua_shared_dict headgate_table 8m;`",
            )


@check("control-open", Severity.SEVERE)
def control_open(facts: Facts) -> Iterator[Found]:
    """Everybody on this machine may open the control or API socket: who can, moves all traffic."""
    control = facts.settings.nginx.control
    for path in (control, facts.settings.api.socket):
        made, directory = (facts.paths.get(each) for each in (path, os.path.dirname(path)))
        close = f"chmod 0750 {os.path.dirname(path)}, and give it the group of those who may"
        if made and made.mode is not None and stat.S_ISSOCK(made.mode):
            if made.open and made.mode & stat.S_IWOTH:
                message = f"its mode is {stat.S_IMODE(made.mode):04o} and others may enter its directory"
                yield Found(path, path, message, close)
        elif path == control and any(_controls(facts)) and directory and directory.open and directory.mode:
            mode = stat.S_IMODE(directory.mode)
            if mode & stat.S_IXOTH:
                message = f"nginx makes this socket for everybody (0666), and its directory's mode is {mode:04o}"
                yield Found(path, directory.path, message, close)


@check("token-open", Severity.SEVERE)
def token_open(facts: Facts) -> Iterator[Found]:
    """Others may read the file with the API's token."""
    made = facts.paths.get(facts.settings.api.token_file or "")
    if made and made.mode is not None and made.open and made.mode & stat.S_IROTH:
        yield Found(made.path, made.path, f"its mode is {stat.S_IMODE(made.mode):04o}", f"chmod 0600 {made.path}")


@check("snapshot-directory", Severity.SEVERE)
def snapshot_directory(facts: Facts) -> Iterator[Found]:
    """The snapshot's directory is missing or cannot be written: no table can be published."""
    directory = facts.paths.get(os.path.dirname(facts.settings.nginx.snapshot))
    if directory is None or not any(facts.hooks()) or (directory.mode is not None and directory.writable):
        return
    missing = directory.mode is None
    yield Found(
        facts.settings.nginx.snapshot,
        f"{directory.path}, {facts.setting('nginx.snapshot')}",
        "its directory does not exist" if missing else "its directory cannot be written by the user who asks",
        f"{'create it' if missing else 'give it to the daemon, or ask as the daemon'}: install -d -m 0750 "
        f"{directory.path}",
    )


def _named(hook: Node) -> str:
    call = re.search(r"""\bbalance\s*\(?\s*(["'])(.*?)\1""", hook.lua or "")
    return call[2] if call else ""


def _dicts(facts: Facts, name: str) -> list[Node]:
    return [node for node in facts.conf.find("lua_shared_dict") if len(node.args) == 2 and node.args[0] == name]


def _controls(facts: Facts) -> Iterator[Node]:
    """The unix `listen` of each server that calls Headgate's control."""
    for content in facts.conf.find(*lua_directives("content")):
        server = content.within("server")
        if server and content.lua is not None and calls(content.lua, "control"):
            yield from (node for node in server.own("listen") if node.args and node.args[0].startswith("unix:"))
