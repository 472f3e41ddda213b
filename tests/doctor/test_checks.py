"""Every check fires on a bad set-up, with the place that is to blame, and is silent on the same one put right."""

from __future__ import annotations

import stat
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.conf.parse import ConfSyntaxError, Place
from controller.conf.tree import Node
from controller.doctor.checks import CHECKS, examine
from controller.doctor.model import (
    Facts,
    Finding,
    Found,
    NginxMaster,
    NginxWorker,
    PathFact,
    PidFile,
    Severity,
)
from tests.doctor.site import CONF, HOOK, app, facts, http, managed, nginx, server

TWO = "server 127.0.0.1:8001; server 127.0.0.1:8002;"
THREE = f"{TWO} server 127.0.0.1:8003;"
TO_APP = "server { location / { proxy_pass http://app; } }"
KEPT = 'proxy_http_version 1.1;\nproxy_set_header Connection "";'
RELOAD = "reload"
SOCKET = stat.S_IFSOCK
DIRECTORY = stat.S_IFDIR


class Case(NamedTuple):
    """`evidence` is a part of the evidence; `severity` the one expected, the check's own unless it says so."""

    check: str
    bad: Facts
    good: Facts
    evidence: str
    severity: Severity | None = None


def reloading(known: Facts) -> Facts:
    """The same set-up with Headgate on the reload plane."""
    nginx_table = known.settings.nginx.model_copy(update={"data_plane": RELOAD})
    settings = known.settings.model_copy(update={"nginx": nginx_table})
    return Facts(**{name: getattr(known, name) for name in Facts.__slots__} | {"settings": settings})


def upstream(lines: str, more: str = "", **known: Any) -> Facts:
    """An upstream `app` that nginx balances by itself, on line 3."""
    return http(f"upstream app {{ {lines} }}\n{more}", **known)


def process(**table: Any) -> dict[str, Any]:
    return {"upstream": {"app": {"process": {"unit": "app.service", **table}}}}


def hashing(key: str) -> dict[str, Any]:
    return {"upstream": {"app": {"balance": {"method": "hash", "key": key}}}}


def unit(**properties: str) -> dict[str, Any]:
    return {"units": {"app.service": properties}}


def master(*leaving: bool, **known: Any) -> NginxMaster:
    return NginxMaster(5, tuple(NginxWorker(10 + at, 1000.0 + at, out) for at, out in enumerate(leaving)), **known)


SEVERE, WARNING, HINT = Severity
CASES = [
    Case("unseen", http("", unseen=(Found("a", "pid 3", "b", "c"),)), http(""), "pid 3"),
    Case(
        "conf-broken",
        Facts(broken=ConfSyntaxError('unexpected "}"', Place(CONF, 9))),
        Facts(),
        f"{CONF}:9",
    ),
    Case("worker-shutdown-timeout", facts("http { }"), http(""), CONF, HINT),
    Case("worker-shutdown-timeout", reloading(facts("http { }")), reloading(http("")), CONF),
    Case("nginx-leak", http("", nginx=nginx(1, 22, 1)), http("", nginx=nginx(1, 25, 3)), "nginx -V", HINT),
    Case(
        "nginx-leak",
        reloading(http("", nginx=nginx(1, 21, 5), master=master())),
        http("", nginx=nginx(1, 20, 2)),
        "pid 5",
    ),
    Case("nginx-truncation", http("", nginx=nginx(1, 22, 1)), http("", nginx=nginx(1, 23, 1)), "nginx -V", HINT),
    Case("nginx-truncation", reloading(http("", nginx=nginx(1, 18, 0))), http("", nginx=nginx(1, 17, 4)), "nginx -V"),
    Case(
        "http2-stays",
        http("server { listen 443 ssl http2; }", nginx=nginx(1, 22, 1)),
        http("server { listen 443 ssl; }", nginx=nginx(1, 22, 1)),
        f"{CONF}:3",
        HINT,
    ),
    Case(
        "http2-stays",
        reloading(http("http2 on;", nginx=nginx(1, 26, 0))),
        reloading(http("http2 on;", nginx=nginx(1, 27, 1))),
        f"{CONF}:3",
    ),
    Case(
        "reload-closes-clients",
        reloading(http("", nginx=nginx(1, 28, 0))),
        reloading(http("keepalive_min_timeout 5s;", nginx=nginx(1, 28, 0))),
        "nginx.data_plane",
    ),
    Case("reload-closes-clients", reloading(http("", nginx=nginx(1, 22, 1))), http(""), "nginx.data_plane"),
    *(
        Case("reload-ignores", reloading(http("", toml=toml)), http("", toml=toml), f"headgate.toml: {evidence}")
        for toml, evidence in (
            ({"defaults": {"outlier": {"errors": 5, "hosts": 3}}}, "defaults.outlier.errors, defaults.outlier.hosts"),
            ({"upstream": {"app": {"warm_up": {"ignore_paths": ["/a"]}}}}, "upstream.app.warm_up.ignore_paths"),
            ({"upstream": {"app": {"warm_up": {"hold_errors": 4}}}}, "upstream.app.warm_up.hold_errors"),
            ({"defaults": {"quarantine": {"marks": True}}}, "defaults.quarantine.marks"),
            ({"defaults": {"sticky": {"max_age": 60}}}, "defaults.sticky.max_age"),
            ({"defaults": {"balance": {"bound": 1.25}}}, "defaults.balance.bound"),
            ({"defaults": {"rollout": {"max_latency": 2}}}, "defaults.rollout.max_latency"),
        )
    ),
    Case(
        "reload-ignores",
        reloading(http("", toml={"defaults": {"outlier": {"errors": 9}}, "upstream": {"app": {"drain": {}}}})),
        reloading(
            http("", toml={"defaults": {"warm_up": {"curve": 2, "hold_errors": 0}, "quarantine": {"marks": False}}})
        ),
        "headgate.toml: defaults.outlier.errors",
    ),
    Case(
        "old-workers", http("", master=master(False, True, True)), http("", master=master(False, False, True)), "pid 11"
    ),
    Case("not-loaded", http("", changed=("/a", "/b", "/c", "/d")), http(""), "/c (and 1 more)"),
    Case("nginx-replaced", http("", master=master(replaced=True)), http("", master=master()), "pid 5"),
    Case(
        "pid-file",
        http("", pid_files=(PidFile("/run/a.pid", 9), PidFile("/run/b.pid", None), PidFile("/run/c.pid", 1, True))),
        http("", pid_files=(PidFile("/run/a.pid", 9, True, True),)),
        "/run/c.pid",
    ),
    Case(
        "upstream-keepalive",
        upstream(f"{TWO} keepalive 8;", apps=(app(keep_alive=2.0),)),
        upstream(f"{TWO} keepalive 8; keepalive_timeout 1s;", apps=(app(keep_alive=2.0),)),
        f"{CONF}:3, pid 7",
    ),
    Case(
        "upstream-keepalive",
        upstream(f"{TWO}\nkeepalive 8;\nkeepalive_timeout 1m;", apps=(app(keep_alive=60.0),)),
        upstream(f"{TWO} keepalive 8;", apps=(app(keep_alive=75.0), app(keep_alive=0.0))),
        f"{CONF}:5, pid 7",
    ),
    Case(
        "upstream-keepalive",
        upstream(f"{TWO} keepalive 8;", apps=(app(keep_alive=None),)),
        upstream(f"{TWO} keepalive 8; keepalive_timeout 1500ms;"),
        f"{CONF}:3",
        HINT,
    ),
    Case(
        "upstream-keepalive",
        upstream(TWO, nginx=nginx(1, 29, 7), apps=(app(keep_alive=5.0),)),
        upstream(f"{TWO} keepalive 0;", nginx=nginx(1, 29, 7), apps=(app(keep_alive=5.0),)),
        f"{CONF}:3, pid 7",
    ),
    Case(
        "keepalive-ineffective",
        upstream(f"{TWO} keepalive 8;", TO_APP),
        upstream(f"{TWO} keepalive 8;", f"{KEPT}\n{TO_APP}"),
        f"{CONF}:4",
    ),
    Case(
        "keepalive-ineffective",
        upstream(
            f"{TWO} keepalive 8;",
            KEPT + "\nserver { location / { proxy_set_header Host a;\nproxy_pass http://APP/x; } }",
        ),
        upstream(f"{TWO} keepalive 8;", "proxy_http_version 1.1; proxy_set_header Connection $upgrade;" + TO_APP),
        f"{CONF}:7",
    ),
    Case(
        "keepalive-ineffective",
        upstream(f"{TWO} keepalive 8;", f"proxy_http_version 1.1; proxy_set_header connection Close;\n{TO_APP}"),
        upstream(f"{TWO} keepalive 8;", TO_APP, nginx=nginx(1, 29, 7)),
        f"{CONF}:5",
    ),
    Case(
        "post-not-retried",
        upstream(TWO, TO_APP),
        upstream(TWO, f"proxy_next_upstream error non_idempotent; {TO_APP}"),
        f"{CONF}:4",
    ),
    Case(
        "post-not-retried",
        upstream(TWO, "server { location / { grpc_pass grpcs://app; } }"),
        upstream(TWO, f"proxy_next_upstream off; {TO_APP}"),
        f"{CONF}:4",
    ),
    Case(
        "tries-unlimited",
        upstream(THREE, TO_APP),
        upstream(THREE, f"proxy_next_upstream_tries 2; {TO_APP}"),
        f"{CONF}:4",
    ),
    Case(
        "tries-unlimited",
        upstream(
            THREE,
            f"proxy_next_upstream_tries 2;\nserver {{ proxy_next_upstream_tries 0;\n {TO_APP[9:]}",
        ),
        upstream(TWO, TO_APP),
        f"{CONF}:6",
    ),
    Case(
        "auth-by-upstream",
        managed(more="server { location /a { auth_request /auth; }\nlocation = /auth { proxy_pass http://app; } }"),
        managed(more="log_subrequest on; server { auth_request /a; location = /a { proxy_pass http://app; } }"),
        f"{CONF}:10, {CONF}:11",
    ),
    Case(
        "auth-by-upstream",
        managed(more="server { mirror /m/x; location / { return 200; }\nlocation /m/ { proxy_pass http://app; } }"),
        managed(more="server { auth_request off; location / { proxy_pass http://app; } }"),
        f"{CONF}:10, {CONF}:11",
    ),
    Case(
        "last-survivor",
        upstream("server 127.0.0.1:1 down;\nserver 127.0.0.1:2;\nserver 127.0.0.1:3 down;"),
        upstream("server 127.0.0.1:1 down; server 127.0.0.1:2 max_fails=0;"),
        f"{CONF}:4",
    ),
    Case(
        "last-survivor",
        upstream("server 127.0.0.1:1; server 127.0.0.1:2 down backup;"),
        upstream("server 127.0.0.1:1;"),
        f"{CONF}:3",
    ),
    Case("hash-remaps", upstream(f"ip_hash; {TWO}"), upstream(f"hash $uri consistent; {TWO}"), f"{CONF}:3"),
    *(
        Case(
            "hash-no-ramp",
            reloading(upstream(f"{method}; {TWO}", toml={"upstream": {"app": {}}})),
            reloading(upstream(f"{method}; {TWO}", toml={"upstream": {"app": {"warm_up": {"duration": "0s"}}}})),
            f"{CONF}:3",
        )
        for method in ("ip_hash", "hash $uri", "hash $uri consistent")
    ),
    *(
        Case("hash-key", managed(more=more, toml=hashing(bad)), managed(more=more, toml=hashing(good)), evidence)
        for bad, good, evidence, more in (
            ("$nosuchvariable", "$cookie_session", "headgate.toml: upstream.app.balance.key", ""),
            ("$host${nosuch}", "${Host}-$1-$arg_x", "upstream.app.balance.key", ""),
            ("$tenat", "$tenant", "upstream.app.balance.key", "map $host $tenant { default a; }"),
            ("$usr", "$user", "upstream.app.balance.key", "server { location ~ ^/(?<user>[^/]+)/ { } }"),
        )
    ),
    Case(
        "hash-key",
        managed(toml={"defaults": {"balance": {"method": "hash", "key": "$nosuch"}}}),
        managed(toml=hashing("$uri")),
        "headgate.toml: defaults.balance.key",
    ),
    *(
        Case(
            "bound-idle",
            managed(f"{method} {TWO} {HOOK}", toml={"upstream": {"app": {"balance": {"bound": 1.25}}}}),
            managed(f"hash $uri consistent; {TWO} {HOOK}", toml={"upstream": {"app": {"balance": {"bound": 1.25}}}}),
            "headgate.toml: upstream.app.balance.bound",
        )
        for method in ("", "hash $uri;", "least_conn;")
    ),
    Case(
        "bound-idle",
        managed(toml={"upstream": {"app": {"balance": {"bound": 2}}}}),
        managed(toml={"defaults": {"balance": {"bound": 2}}, "upstream": {"app": {"drain": {}}}}),
        "headgate.toml: upstream.app.balance.bound",
    ),
    Case("burst", upstream(f"least_conn; {TWO}"), upstream(f"random; {TWO}"), f"{CONF}:3"),
    Case("burst", upstream(f"random two least_conn; {TWO}"), upstream(TWO), f"{CONF}:3"),
    Case("lone-warm-up", managed(f"server 127.0.0.1:1; {HOOK}"), managed(), f"{CONF}:3"),
    Case(
        "lone-warm-up",
        managed(f"server unix:/a; {HOOK}"),
        managed(f"server unix:/a; {HOOK}", toml={"defaults": {"warm_up": {"duration": 0}}}),
        f"{CONF}:3",
    ),
    Case("lone-warm-up", managed(f"server [::1]:80; {HOOK}"), managed(f"server many.example; {HOOK}"), f"{CONF}:3"),
    Case(
        "probe-timeout",
        http("", toml={"defaults": {"check": {"interval": "1s", "timeout": "1s"}}}),
        http(""),
        "headgate.toml: defaults.check.timeout",
    ),
    Case(
        "probe-timeout",
        http("", toml={"upstream": {"app": {"check": {"timeout": "2s"}}}}),
        http("", toml={"upstream": {"app": {"check": {"timeout": "1s"}}}}),
        "headgate.toml: upstream.app.check.timeout",
    ),
    Case(
        "ephemeral-port",
        http("", servers=(("app", server(40000)),), ephemeral=range(32768, 61000)),
        http("", servers=(("app", server(8001)),), ephemeral=range(32768, 61000)),
        "127.0.0.1:40000",
    ),
    Case("not-adopted", upstream(TWO), managed(), f"{CONF}:3"),
    Case(
        "hook-name",
        managed(f'{TWO}\nbalancer_by_lua_block {{ require("headgate").balance("b") }}'),
        managed(),
        f"{CONF}:4",
    ),
    Case(
        "hook-name",
        managed(f'{TWO} balancer_by_lua_block {{ require("headgate").balance(name) }}'),
        managed(),
        f"{CONF}:3",
    ),
    Case("hook-zone", managed(f"zone app 64k;\n{TWO} {HOOK}"), managed(), f"{CONF}:3"),
    Case(
        "hook-order",
        managed(f"{TWO} keepalive 8;\n{HOOK}"),
        managed(f"{TWO} {HOOK} keepalive 8;"),
        f"{CONF}:4, keepalive in {CONF}:3",
    ),
    Case("unmanaged", managed(f"server a service=b;\nserver c service=d; {HOOK}"), managed(), f"{CONF}:3"),
    Case("plane-incomplete", upstream(f"{TWO} {HOOK}"), managed(), f"{CONF}:3"),
    Case(
        "lua-missing",
        managed(nginx=nginx(1, 22, 1)),
        managed(nginx=nginx(1, 22, 1, arguments="--add-module=../lua-nginx-module")),
        f"{CONF}:3",
    ),
    Case(
        "lua-missing",
        managed(nginx=nginx(1, 26, 0)),
        facts(
            "load_module modules/ngx_http_lua_module.so; http { upstream app { " + TWO + HOOK + " } }",
            nginx=nginx(1, 26, 0),
        ),
        f"{CONF}:3",
    ),
    Case("own-init", managed(more="init_by_lua_block { x = 1 }"), managed(), f"{CONF}:10"),
    Case(
        "own-init",
        upstream(
            f"{TWO} {HOOK}", "init_worker_by_lua_file /a.lua;", files={"/a.lua": '-- require("headgate").init_worker()'}
        ),
        upstream(
            f"{TWO} {HOOK}", "init_worker_by_lua_file /a.lua;", files={"/a.lua": 'require "headgate".init_worker()'}
        ),
        f"{CONF}:4",
    ),
    Case(
        "hidden-log",
        managed(more="server {\nlog_by_lua_block { x = 1 }\nlocation / { proxy_pass http://app; } }"),
        managed(more='server { location / { log_by_lua_block { require("headgate").log() } proxy_pass http://app; } }'),
        f"{CONF}:11",
    ),
    Case(
        "hidden-log",
        managed(more="server { location / {\nlog_by_lua_block { x = 1 } set $up app; proxy_pass http://$up; } }"),
        managed(more="server { location / { set $up app; proxy_pass http://$up; } }"),
        f"{CONF}:11",
    ),
    Case(
        "hidden-log",
        managed(more="server { location / { proxy_pass http://app; log_by_lua_file relative.lua; } }"),
        managed(more="server { location / { proxy_pass http://127.0.0.1:9; log_by_lua 'x = 1'; } }"),
        f"{CONF}:10",
        HINT,
    ),
    Case(
        "plane-paths",
        managed(toml={"nginx": {"control": "/run/other.sock"}}),
        managed(),
        f"{CONF}:9, headgate.toml: nginx.control",
    ),
    Case(
        "plane-paths",
        managed(toml={"nginx": {"snapshot": "/var/t.json"}}),
        managed(),
        f"{CONF}:6, headgate.toml: nginx.snapshot",
    ),
    Case(
        "dict-size",
        managed(" ".join(f"server 127.0.0.1:{port};" for port in range(1, 20001)) + HOOK),
        managed(" ".join(f"server 127.0.0.1:{port};" for port in range(1, 1001)) + HOOK),
        f"{CONF}:4",
    ),
    Case(
        "control-open",
        managed(paths={"/run/headgate/nginx.sock": PathFact("/run/headgate/nginx.sock", SOCKET | 0o666, True)}),
        managed(paths={"/run/headgate/nginx.sock": PathFact("/run/headgate/nginx.sock", SOCKET | 0o666, False)}),
        "/run/headgate/nginx.sock",
    ),
    Case(
        "control-open",
        managed(paths={"/run/headgate": PathFact("/run/headgate", DIRECTORY | 0o755, True)}),
        managed(paths={"/run/headgate": PathFact("/run/headgate", DIRECTORY | 0o750, True)}),
        "/run/headgate",
    ),
    Case(
        "control-open",
        http("", paths={"/run/headgate/api.sock": PathFact("/run/headgate/api.sock", SOCKET | 0o666, True)}),
        http("", paths={"/run/headgate/api.sock": PathFact("/run/headgate/api.sock", SOCKET | 0o660, True)}),
        "/run/headgate/api.sock",
    ),
    Case(
        "token-open",
        http(
            "",
            toml={"api": {"token_file": "/etc/passwd"}},
            paths={"/etc/passwd": PathFact("/etc/passwd", 0o100644, True)},
        ),
        http(
            "",
            toml={"api": {"token_file": "/etc/passwd"}},
            paths={"/etc/passwd": PathFact("/etc/passwd", 0o100640, True)},
        ),
        "/etc/passwd",
    ),
    Case(
        "snapshot-directory",
        managed(paths={"/var/lib/headgate": PathFact("/var/lib/headgate")}),
        managed(paths={"/var/lib/headgate": PathFact("/var/lib/headgate", DIRECTORY | 0o750, True, True)}),
        "/var/lib/headgate, headgate.toml: nginx.snapshot",
    ),
    Case(
        "snapshot-directory",
        managed(paths={"/var/lib/headgate": PathFact("/var/lib/headgate", DIRECTORY | 0o750, True, False)}),
        http("", paths={"/var/lib/headgate": PathFact("/var/lib/headgate")}),
        "/var/lib/headgate, headgate.toml: nginx.snapshot",
    ),
    Case(
        "process-unfit",
        http("", unfit=(("app", server(), "no", "yes"),)),
        http(""),
        "headgate.toml: upstream.app.process",
    ),
    Case(
        "no-start",
        http("", toml=process(unit=None, pid_file="/run/a.pid")),
        http("", toml=process(unit=None, start=["gunicorn", "app:app"])),
        "headgate.toml: upstream.app.process",
    ),
    Case(
        "graceful-disagrees",
        http("", toml=process(graceful_timeout=20, margin=5), apps=(app(),)),
        http("", toml=process(graceful_timeout=30, margin=5), apps=(app(),)),
        "pid 7, headgate.toml: upstream.app.process.graceful_timeout",
    ),
    Case(
        "gunicorn-timeout",
        http("", apps=(app(timeout=30),)),
        http("", apps=(app(), app(timeout=0), app(timeout=None))),
        "pid 7",
    ),
    Case(
        "uvicorn-graceful",
        http("", apps=(app(uvicorn=True),)),
        http("", apps=(app(uvicorn=True, own_graceful=25.0), app(uvicorn=True, own_graceful=float("inf")), app())),
        "pid 7",
    ),
    Case(
        "uvicorn-graceful",
        http("", apps=(app(uvicorn=True, own_graceful=30.0),)),
        http("", apps=(app(uvicorn=None),)),
        "pid 7",
    ),
    Case(
        "uvicorn-deprecated",
        http("", apps=(app(worker_class="uvicorn.workers.UvicornH11Worker"),)),
        http("", apps=(app(worker_class="uvicorn_worker.UvicornWorker"),)),
        "pid 7",
    ),
    Case("daemon-mode", http("", apps=(app(daemon=True),)), http("", apps=(app(daemon=False),)), "pid 7"),
    Case(
        "preload-reload",
        http("", apps=(app(preload_app=True),)),
        http("", apps=(app(preload_app=False),)),
        "pid 7",
        HINT,
    ),
    Case(
        "preload-reload",
        http(
            "",
            apps=(app(preload_app=True, unit="app.service"),),
            **unit(ExecReload="{ path=/bin/kill ; argv[]=/bin/kill -s HUP $MAINPID }"),
        ),
        http(
            "",
            apps=(app(unit="app.service"),),
            **unit(ExecReload="{ path=/bin/kill ; argv[]=/bin/kill -s HUP $MAINPID }"),
        ),
        "pid 7, ExecReload of app.service",
    ),
    Case(
        "backlog",
        http("", somaxconn=128, apps=(app(at=server(0, "unix:/run/app.sock")),)),
        http("", somaxconn=4096, apps=(app(at=server(0, "unix:/run/app.sock")), app(backlog=64))),
        "pid 7",
    ),
    Case(
        "unit-unknown",
        http("", toml=process(unit=None, start=["a"]), apps=(app(unit="app.service"),), **unit(Restart="always")),
        http("", toml=process(), apps=(app(unit="app.service"),), **unit(Restart="always")),
        "pid 7, headgate.toml: upstream.app.process",
    ),
    Case(
        "unit-unknown",
        http("", toml=process(unit=None, start=["a"]), apps=(app(unit="app.service"),), **unit(Restart="on-failure")),
        http("", toml=process(unit=None, start=["a"]), apps=(app(unit="app.service"),), **unit(Restart="no")),
        "pid 7",
        WARNING,
    ),
    Case(
        "stop-timeout",
        http("", apps=(app(unit="app.service", graceful_timeout=90),), **unit(TimeoutStopUSec="1min 30s")),
        http("", apps=(app(unit="app.service", graceful_timeout=90),), **unit(TimeoutStopUSec="1min 40s")),
        "pid 7, TimeoutStopSec of app.service",
    ),
    Case(
        "stop-timeout",
        http("", apps=(app(unit="app.service"),), **unit(TimeoutStopUSec="500ms")),
        http("", apps=(app(unit="app.service"),), **unit(TimeoutStopUSec="infinity")),
        "pid 7",
    ),
    Case(
        "kill-mode",
        http("", apps=(app(unit="app.service"),), **unit(KillMode="control-group")),
        http("", apps=(app(unit="app.service"),), **unit(KillMode="mixed")),
        "pid 7, KillMode of app.service",
    ),
    Case(
        "kill-mode",
        http("", apps=(app(unit="app.service"),), **unit(KillMode="process")),
        http("", apps=(app(),), **unit(KillMode="process")),
        "pid 7",
    ),
    Case(
        "kill-signal",
        http("", apps=(app(unit="app.service"),), **unit(KillSignal="3")),
        http("", apps=(app(unit="app.service"),), **unit(KillSignal="15")),
        "pid 7, KillSignal of app.service",
    ),
]


def of(check: str, known: Facts) -> list[Finding]:
    return [finding for finding in examine(known) if finding.check == check]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.check)
def test_a_check_fires_on_the_trap_and_is_silent_when_it_is_put_right(case: Case) -> None:
    found = of(case.check, case.bad)
    own = next(check.severity for check in CHECKS if check.id == case.check)
    assert found, "nothing was found"
    assert case.evidence in [finding.evidence for finding in found][-1]
    assert {finding.severity for finding in found} == {case.severity or own}
    assert all(finding.subject and finding.message and finding.remedy for finding in found)
    assert of(case.check, case.good) == []


def test_every_check_has_a_case_and_an_id_and_severity_of_its_own() -> None:
    assert {case.check for case in CASES} == {check.id for check in CHECKS}
    assert len({check.id for check in CHECKS}) == len(CHECKS)
    order = list(Severity)
    for case in CASES:
        own = next(check.severity for check in CHECKS if check.id == case.check)
        assert order.index(case.severity or own) >= order.index(own), f"{case.check} can be graver than it says"


def test_findings_come_gravest_first_and_none_twice() -> None:
    found = examine(upstream(f"least_conn; {THREE} keepalive 8;", TO_APP, apps=(app(keep_alive=2.0, timeout=30),)))
    severities = [finding.severity for finding in found]
    assert severities == sorted(severities, key=list(Severity).index)
    assert set(severities) == set(Severity)
    assert len(set(found)) == len(found)


def test_a_good_set_up_has_nothing_to_be_said_about() -> None:
    good = managed(
        f"{THREE} {HOOK} keepalive 8; keepalive_timeout 60s;",
        f"{KEPT} proxy_next_upstream error timeout non_idempotent; proxy_next_upstream_tries 2; {TO_APP}",
        nginx=nginx(1, 28, 0, arguments="--add-module=lua"),
        apps=(app(keep_alive=75.0, unit="app.service"),),
        toml=process(),
        units={"app.service": {"Restart": "always", "KillMode": "mixed", "TimeoutStopUSec": "40s", "KillSignal": "15"}},
        paths={"/var/lib/headgate": PathFact("/var/lib/headgate", DIRECTORY | 0o750, True, True)},
    )
    assert examine(good) == ()


NAMES = (
    *("zone", "keepalive", "keepalive_timeout", "ip_hash", "hash", "least_conn", "random", "proxy_pass", "grpc_pass"),
    *("listen", "http2", "mirror", "auth_request", "proxy_set_header", "proxy_http_version", "proxy_next_upstream"),
    *("proxy_next_upstream_tries", "lua_shared_dict", "load_module", "log_subrequest", "server", "location", "http"),
    *("upstream", "balancer_by_lua_block", "init_by_lua_file", "init_worker_by_lua", "log_by_lua_block", "pid"),
)
WORDS = ["app", "0", "60s", "=", "/a", "http://app", "unix:/x", "headgate_table", "8m", 'require("headgate").log()', ""]


NODES = st.builds(
    Node,
    st.sampled_from(NAMES),
    st.lists(st.sampled_from(WORDS), max_size=3).map(tuple),
    st.just(Place(CONF, 1)),
    block=st.none() | st.just([]),
    lua=st.none() | st.sampled_from(WORDS),
)


def adopted(node: Node) -> Node:
    """The node with its descendants told where they stand."""
    for inner in node.block or ():
        inner.outer = node
        adopted(inner)
    return node


@settings(max_examples=300, deadline=None)
@given(st.lists(NODES, min_size=10, max_size=40))
def test_no_directive_however_wrong_upsets_a_check(inside: list[Node]) -> None:
    sound = managed(f"{TWO} {HOOK} keepalive 8;", more=TO_APP)
    blocks = [node for node in sound.conf.find("http", "upstream", "server", "location") if node.block is not None]
    for block in blocks:
        block.block = [*(block.block or ()), *inside]
    root = adopted(Node("", (), sound.conf.place, block=[*(sound.conf.block or ()), *inside]))
    for finding in examine(replace(sound, conf=root)):
        assert finding.evidence
