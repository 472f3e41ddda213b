"""What of a whole nginx configuration keeps it, or one of its upstreams, from the Lua plane, each with the remedy.

Pure: a tree in, sentences out. What adoption writes stands in adopt.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from controller.conf.parse import METHODS, is_balanced_in_lua, shown
from controller.conf.tree import Node, calls

_LOG = ("log_by_lua", "log_by_lua_block", "log_by_lua_file")
_PASSES = ("proxy_pass", "fastcgi_pass", "uwsgi_pass", "scgi_pass", "grpc_pass", "memcached_pass")
_ONCE = {"init_by_lua": "init", "init_worker_by_lua": "init_worker", "log_by_lua": "log"}
_BUCKET, _BUCKET_SIZE = "proxy_headers_hash_bucket_size", 1024
_HEADGATE = re.compile(r"""require\s*\(?\s*(["'])headgate\1""")


@dataclass(slots=True)
class Found:
    """What was found.

    `general` keeps everything from being adopted, `upstreams` those by name; `notes` keep nothing. `taken` are the
    directives of our include, without `_block`, that the user's own ones do the work of already. `by_hand` is the file
    in which somebody has written what our include holds.
    """

    general: list[str] = field(default_factory=list)
    upstreams: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    by_hand: str | None = None


def find(root: Node, include: str, lua: str, code: dict[str, str]) -> Found:
    """Obstacles in the tree of nginx.conf, in which `include` is a file of ours and `lua` the directory of our modules.

    `code` is what our include runs in init_by_lua, init_worker_by_lua and log_by_lua.
    """
    found = Found()
    for http in root.own("http"):
        tables = [node for node in http.own("lua_shared_dict") if node.args[:1] == ("headgate_table",)]
        found.by_hand = next((node.place.file for node in tables if node.place.file != include), None)
        _once(http, include, lua, code, found)
        for node in http.find("lua_code_cache"):
            if node.args == ("off",):
                found.general.append(f"{node.place}: lua_code_cache off forgets what Headgate knows; take it out")
        _hides(http, include, found)
        for upstream in http.own("upstream"):
            if reason := next(_of_upstream(upstream), None):
                found.upstreams[" ".join(upstream.args)] = reason
        _logs(http, code["log_by_lua"], found)
    return found


def loads_module(root: Node) -> bool:
    """Whether the configuration loads nginx's Lua module."""
    return any(node.args and node.args[0].endswith("ngx_http_lua_module.so") for node in root.own("load_module"))


def strangers(root: Node, include: str) -> list[str]:
    """Where code that is not ours to remove needs our modules, each with the remedy."""
    return [
        f"{node.place}: this {node.name} calls headgate, which will be gone; take that out of it first"
        for node in _with_lua(root)
        if _HEADGATE.search(node.lua or "") and node.place.file != include and not is_hook(node)
    ]


def is_hook(node: Node) -> bool:
    """Whether this is a hook as AddHook writes it."""
    name = " ".join(node.outer.args) if node.outer and node.outer.name == "upstream" else None
    hook = f'require("headgate").balance("{name}")'
    return node.name == "balancer_by_lua_block" and (node.lua or "").strip() == hook


def hooked(root: Node) -> list[str]:
    """The upstreams that have our hook."""
    upstreams = [upstream for http in root.own("http") for upstream in http.own("upstream")]
    return [" ".join(each.args) for each in upstreams if any(is_hook(node) for node in each.block or ())]


def _with_lua(node: Node) -> Iterator[Node]:
    for each in node.block or ():
        if each.lua is not None:
            yield each
        yield from _with_lua(each)


def _once(http: Node, include: str, lua: str, code: dict[str, str], found: Found) -> None:
    """nginx takes some directives of our include once in http, so the user's own ones must do their work."""
    for family, function in _ONCE.items():
        for node in http.own(family, f"{family}_block", f"{family}_file"):
            if node.place.file == include:
                continue
            if calls(node.lua or "", function):
                found.taken.add(family)
                continue
            into = f" the file {node.args[0]}, named by its absolute path" if node.name.endswith("_file") else " it"
            message = f"{node.place}: http has a {node.name} of its own, and nginx takes one; put into{into}: "
            found.general.append(message + code[family].strip())
    for node in http.own("lua_package_path"):
        if node.place.file == include:
            continue
        if all(f"{lua}/{file}" in " ".join(node.args) for file in ("?.lua", "?/init.lua")):
            found.taken.add("lua_package_path")
            continue
        message = f"{node.place}: http has a lua_package_path of its own, and nginx takes one; put in front of it: "
        found.general.append(f"{message}{lua}/?.lua;{lua}/?/init.lua;")


def _hides(http: Node, include: str, found: Found) -> None:
    """What keeps the marks, by which a server says that it goes offline, from being hidden from clients."""
    for node in http.own(_BUCKET):
        if node.place.file == include:
            continue
        found.taken.add(_BUCKET)
        if not node.args[:1] or not node.args[0].isdigit() or int(node.args[0]) < _BUCKET_SIZE:
            found.notes.append(f"{node.place}: to hide Sermant's marks from clients, {_BUCKET} must be {_BUCKET_SIZE}")
    for block in dict.fromkeys(node.outer for node in http.find("proxy_hide_header")):
        hidden = block.own("proxy_hide_header") if block and block is not http else []
        if hidden and not any(node.args[:1] == ("X-Headgate-Offline",) for node in hidden):
            found.notes.append(
                f"{hidden[0].place}: this proxy_hide_header replaces ours, so clients would see it when a server marks "
                "itself offline; add: proxy_hide_header X-Headgate-Offline;"
            )


def _of_upstream(upstream: Node) -> Iterator[str]:
    name = " ".join(upstream.args)
    if shown(name) != name:
        what = f'{upstream.place}: upstream "{name}"'
        yield f"{what} has a name that is no UTF-8, which Headgate cannot manage; rename it"
    for node in upstream.block or ():
        what = f'{node.place}: upstream "{name}"'
        if node.name in METHODS and not is_balanced_in_lua(node.name, node.args):
            yield (
                f"{what} is balanced by {' '.join((node.name, *node.args))}, which Headgate does not know in Lua: "
                f'it is left to nginx; take {node.name} out, or choose data_plane = "reload"'
            )
        elif node.name == "zone":
            yield f"{what} has a zone, in which no Lua balancer can work; take the zone out"
        elif node.name == "state":
            yield f"{what} has its servers in a state file; write server lines"
        elif node.name == "server" and any("$" in word for word in node.args[:1]):
            yield f"{what} has a server with a variable, which Headgate cannot follow; write the address"
        elif node.name == "server" and any(shown(word) != word for word in node.args[:1]):
            yield f"{what} has a server with a name that is no UTF-8, which Headgate cannot manage; rename that socket"
        elif node.name == "server" and any(word.startswith("service=") for word in node.args):
            yield f"{what} finds servers by SRV records (service=), which Headgate does not follow; write addresses"
        elif node.name == "server" and any(re.match("unix:[^/]", word) for word in node.args[:1]):
            yield f'{what} has a unix socket without an absolute path; write it from "/" on'


def _logs(http: Node, code: str, found: Found) -> None:
    """A log_by_lua further in replaces ours: requests that end there would be counted as in flight for ever."""
    names = {name.lower(): name for each in http.own("upstream") if (name := " ".join(each.args))}
    passes = [(node, node.inherited(*_LOG)) for node in http.find(*_PASSES)]
    for log in http.find(*_LOG):
        if log.outer is http or calls(log.lua or "", "log"):
            continue
        remedy = f"put into it: {code.strip()}"
        around = f"this {log.name} replaces the one that ends the count of each request"
        targets = {_target(node) for node, logs in passes if log in logs}
        if not targets:
            found.notes.append(f"{log.place}: {around}; if requests are redirected to here, {remedy}")
        elif any("$" in target for target in targets):
            found.general.append(f"{log.place}: {around}; {remedy}")
        for target in (names.get(each, each) for each in targets):
            found.upstreams.setdefault(target, f'{log.place}: {around}, for upstream "{target}"; {remedy}')


def _target(node: Node) -> str:
    """The upstream that a `…_pass` names, in small letters as nginx compares them, or whatever stands in its place."""
    match = re.fullmatch(r"(?:\w+://)?([^/]*).*", " ".join(node.args), re.DOTALL)
    return match[1].lower() if match else ""
