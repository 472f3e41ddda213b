"""Facts for the checks: configuration text, parsed as the doctor parses files, and whatever else a case needs."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from controller.conf import tree
from controller.conf.parse import parse
from controller.core.model import Server
from controller.doctor.model import App, Facts, Nginx
from controller.settings import build

CONF = "/etc/nginx/nginx.conf"
HOOK = 'balancer_by_lua_block { require("headgate").balance("app") }'
PLANE = """lua_shared_dict headgate_table 8m;
lua_shared_dict headgate_state 1m;
init_by_lua_block { require("headgate").init { socket = "/run/headgate/nginx.sock", snapshot = "SNAPSHOT" } }
init_worker_by_lua_block { require("headgate").init_worker() }
log_by_lua_block { require("headgate").log() }
server { listen "unix:/run/headgate/nginx.sock"; location / { content_by_lua_block { require("headgate").control() } } }
""".replace("SNAPSHOT", "/var/lib/headgate/table.json")


class Files:
    """Files that exist only here."""

    def __init__(self, contents: Mapping[str, str]) -> None:
        self.contents = contents

    def read(self, path: str) -> bytes:
        if path not in self.contents:
            raise FileNotFoundError(2, "No such file or directory", path)
        return self.contents[path].encode()

    def glob(self, pattern: str) -> Sequence[str]:
        return sorted(fnmatch.filter(self.contents, pattern))


def facts(main: str, *, toml: Mapping[str, Any] | None = None, files: Mapping[str, str] = {}, **known: Any) -> Facts:
    """`main` is the whole nginx.conf; `toml` headgate.toml's tables; `known` any other field of Facts."""
    reader = Files({**files, CONF: main})
    return Facts(
        settings=build(toml or {}, {}, "headgate.toml"),
        settings_file="headgate.toml",
        conf=tree.read(CONF, reader),
        upstreams=parse(CONF, reader).upstreams,
        **known,
    )


def http(text: str, **known: Any) -> Facts:
    """`text` stands in http{}, which begins on line 2 (so that its first line is line 3)."""
    return facts(f"worker_shutdown_timeout 10m;\nhttp {{\n{text}\n}}\n", **known)


def managed(
    upstream: str = f"server 127.0.0.1:8001; server 127.0.0.1:8002; {HOOK}", more: str = "", **known: Any
) -> Facts:
    """An upstream `app` on line 3, Headgate's include on lines 4 to 9, and `more` from line 10 on."""
    return http(f"upstream app {{ {upstream} }}\n{PLANE}{more}", **known)


def server(port: int = 8001, ip: str = "127.0.0.1") -> Server:
    return Server(f"{ip}:{port}", f"{ip}:{port}", ip, port)


def app(where: str = "pid 7", at: Server | None = None, **known: Any) -> App:
    """A gunicorn of sync workers behind upstream `app`; fields of App by their names, all else are settings."""
    fields = {name: known.pop(name) for name in ("uvicorn", "keep_alive", "own_graceful", "unit") if name in known}
    settings = {"timeout": 60, "graceful_timeout": 30, "worker_class": "sync", "backlog": 2048, **known}
    return App(where, (("app", at or server()),), settings, **fields)


def nginx(*version: int, arguments: str = "--with-http_v2_module") -> Nginx:
    return Nginx(version, arguments)
