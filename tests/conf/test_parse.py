"""controller.conf.parse on texts, on a tree of our own, and on configurations that other people wrote."""

import os
import subprocess
from pathlib import Path

import pytest

from controller.adapters.nginx.files import DiskReader
from controller.conf.parse import ConfSyntaxError, Place, Tree, UpstreamBlock, duration_seconds, parse
from tests.support.nginx import missing_parts

SITE = Path(__file__).parents[1] / "fixtures" / "conf" / "site"
HOOK = 'balancer_by_lua_block { require("headgate").balance("app") }'


class Texts(dict[str, str]):
    """A reader of texts by path."""

    def read(self, path: str) -> bytes:
        try:
            return self[path].encode("utf-8", "surrogateescape")
        except KeyError:
            raise FileNotFoundError(2, "No such file or directory", path) from None

    def glob(self, pattern: str) -> list[str]:
        return sorted(path for path in self if Path(path).match(pattern))


def read(text: str, **files: str) -> Tree:
    return parse("/etc/nginx.conf", Texts({"/etc/nginx.conf": text, **files}))


def upstream(body: str) -> UpstreamBlock:
    return read(f"http {{ upstream app {{ {body} }} }}").upstreams[0]


def test_a_tree_of_files_gives_its_upstreams_with_file_and_line() -> None:
    tree = parse(str(SITE / "nginx.conf"), DiskReader())
    assert [(each.name, each.hooked) for each in tree.upstreams] == [
        ("app", True),
        ("again", False),
        ("least", True),
        ("wrong", False),
    ]
    app, again, *_ = tree.upstreams
    assert app.place == Place(str(SITE / "conf.d/10-app.conf"), 1)
    assert [str(line.place).removeprefix(f"{SITE}/") for line in app.servers] == [
        "parts/servers.conf:1",
        "parts/servers.conf:2",
        "parts/servers.conf:2",
        "parts/servers.conf:3",
    ]
    assert again.servers == app.servers
    assert [Path(file).name for file in tree.files] == [
        "nginx.conf",
        "mime.types",
        "10-app.conf",
        "servers.conf",
        "20-more.conf",
        "proxy.conf",
    ]


def test_every_parameter_of_a_server_line_is_read() -> None:
    first, second, third, fourth = parse(str(SITE / "nginx.conf"), DiskReader()).upstreams[0].servers
    assert (first.address, first.host, first.port) == ("127.0.0.1:8001", "127.0.0.1", 8001)
    assert (first.weight, first.max_conns, first.max_fails, first.fail_timeout) == (3, 20, 0, 90.0)
    assert (second.host, second.port, second.backup, second.down) == ("::1", 8002, True, False)
    assert (third.unix, third.host, third.port, third.down) == ("/run/app.sock", "", 0, True)
    assert (fourth.host, fourth.port, fourth.weight, fourth.others) == ("app.example", 80, 2, ("slow_start=30s",))


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("10.0.0.1", "10.0.0.1", 80), ("[::1]", "::1", 80), ("[::1]:65535", "::1", 65535), ("a.b:1", "a.b", 1)],
)
def test_an_address_without_a_port_means_port_80(address: str, host: str, port: int) -> None:
    line = upstream(f"server {address};").servers[0]
    assert (line.host, line.port) == (host, port)


@pytest.mark.parametrize(
    "hook",
    [
        HOOK,
        HOOK.replace(" {", "{"),
        "balancer_by_lua_block {\n local hg = require 'headgate'\n hg.balance \"app\"\n}",
        'balancer_by_lua_block { -- balance("other")\n require("headgate").balance("app") --[[ x ]] }',
    ],
)
def test_a_hook_is_recognised_however_its_lua_is_written(hook: str) -> None:
    block = upstream(f"server 127.0.0.1; {hook} keepalive 2;")
    assert block.hooked
    assert block.obstacle == ""


@pytest.mark.parametrize(
    "hook",
    [
        "",
        'balancer_by_lua_block { require("other").balance("app") }',
        'balancer_by_lua_block { -- require("headgate").balance("app")\n }',
        'balancer_by_lua_block { --[==[ require("headgate").balance("app") ]==] }',
    ],
)
def test_an_upstream_that_does_not_call_headgate_is_not_hooked(hook: str) -> None:
    block = upstream(f"server 127.0.0.1; {hook}")
    assert (block.hooked, block.obstacle) == (False, "")


def test_two_hyphens_in_a_string_begin_no_comment() -> None:
    tree = read('http { upstream a--b { server a; balancer_by_lua_block { require("headgate").balance("a--b") } } }')
    assert tree.upstreams[0].hooked


def test_the_file_of_a_hook_is_read() -> None:
    text = "http { upstream app { server a; balancer_by_lua_file /etc/app.lua; } }"
    tree = read(text, **{"/etc/app.lua": 'require("headgate").balance("app")'})
    assert tree.upstreams[0].hooked
    with pytest.raises(ConfSyntaxError, match=r'open\(\) "/etc/app.lua" failed .* in /etc/nginx.conf:1'):
        read(text)


@pytest.mark.parametrize(
    ("directive", "method", "args"),
    [
        ("", "round_robin", ()),
        ("least_conn;", "least_conn", ()),
        ("ip_hash;", "ip_hash", ()),
        ("hash '$uri of ${arg_a}' consistent;", "hash", ("$uri of ${arg_a}", "consistent")),
        ("random two;", "random", ("two",)),
        ("ip_hash; random;", "random", ()),
    ],
)
def test_the_method_of_a_hooked_upstream_comes_with_its_words(
    directive: str, method: str, args: tuple[str, ...]
) -> None:
    block = upstream(f"{directive} server a; {HOOK}")
    assert (block.method, block.method_args, block.obstacle) == (method, args, "")


@pytest.mark.parametrize(
    ("body", "obstacle"),
    [
        (f"server a; {HOOK.replace('app', 'other')}", 'of upstream "app" names "other"; write balance("app")'),
        ('server a; balancer_by_lua_block { require("headgate").balance(name) }', "names no upstream"),
        ("server a; balancer_by_lua_file app.lua;", "absolute path"),
        (f"server a; sticky cookie x; {HOOK}", "is balanced by sticky cookie x"),
        (f"random two least_time=header; server a; {HOOK}", "is balanced by random two least_time=header"),
        (f"server a; {HOOK} ip_hash;", "ip_hash stands behind the hook and switches it off"),
        (f"zone app 64k; server a; {HOOK}", "take out the zone"),
        (f"server $backend:80; {HOOK}", "holds a variable"),
        (f"server a service=http resolve; {HOOK}", "SRV"),
        (f"server unix:app.sock; {HOOK}", 'unix:app.sock is no absolute path; write it from "/" on'),
    ],
)
def test_what_keeps_a_hooked_upstream_from_being_managed_is_said_with_place_and_remedy(
    body: str, obstacle: str
) -> None:
    block = upstream(body)
    assert obstacle in block.obstacle
    assert block.obstacle.startswith("/etc/nginx.conf:1: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http {\n upstream app {\n server a\n }\n}", 'unexpected "}", "server" has no ";" in /etc/nginx.conf:4'),
        ("http {\n", 'unexpected end of file, expecting "}" in /etc/nginx.conf:1'),
        ("events {}\nuser www", 'unexpected end of file, expecting ";" or "}" in /etc/nginx.conf:2'),
        ("http {}\n}", 'unexpected "}" in /etc/nginx.conf:2'),
        ("http { ; }", 'unexpected ";" in /etc/nginx.conf:1'),
        ("http;", 'directive "http" has no opening "{" in /etc/nginx.conf:1'),
        ("http { upstream app; }", 'directive "upstream" has no opening "{" in /etc/nginx.conf:1'),
        ("http { upstream app {} }", 'no servers are inside upstream "app" in /etc/nginx.conf:1'),
        ("http { upstream a { server b; }\nupstream a { server b; } }", 'duplicate upstream "a".*nginx.conf:2'),
        ("http {\n include gone.conf; }", r'open\(\) "/etc/gone.conf" failed .* in /etc/nginx.conf:2'),
        ("include nginx.conf;", '"/etc/nginx.conf" includes itself in /etc/nginx.conf:1'),
        ("http { init_by_lua_block {\n x = [[ }", "unexpected end of file.* of init_by_lua_block in /etc/nginx.conf:2"),
        ("http { upstream a { server b weight=0; } }", 'invalid parameter "weight=0" in /etc/nginx.conf:1'),
        ("http { upstream a { server b max_conns=x; } }", 'invalid parameter "max_conns=x"'),
        ("http { upstream a { server b fail_timeout=1x; } }", 'invalid parameter "fail_timeout=1x"'),
        ("http { upstream a { server b fail_timeout=500ms; } }", 'invalid parameter "fail_timeout=500ms"'),
        ("http { upstream a { server b fail_timeout=30s1m; } }", 'invalid parameter "fail_timeout=30s1m"'),
        ("http { upstream a { server b:0; } }", 'invalid port in upstream "b:0"'),
        ("http { upstream a { server b:; } }", 'invalid port in upstream "b:"'),
        ("http { upstream a { server http://b; } }", 'invalid port in upstream "http://b"'),
        ("http { upstream a { server []:80; } }", 'invalid host in upstream "\\[\\]:80"'),
        ("http { upstream a { server unix:; } }", 'no path in the unix domain socket in upstream "unix:"'),
        ("http { upstream a { server b zone { x; } } }", 'directive "server" is not terminated by ";"'),
        ("http { upstream a { server; } }", 'invalid number of arguments in "server" directive'),
        ("{ " * 5000, "unexpected"),
        ("a { " * 5000 + "include b;" + "} " * 5000, "nested too deeply in /etc/nginx.conf:1"),
    ],
)
def test_what_nginx_refuses_is_an_error_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(ConfSyntaxError, match=message):
        read(text)


def test_a_main_file_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfSyntaxError, match=r'^open\(\) "/gone" failed \(No such file or directory\)$'):
        parse("/gone", Texts())


def test_bytes_that_are_not_utf_8_do_no_harm() -> None:
    assert read("http { # \udcff\n upstream app { server a; } }").upstreams[0].servers[0].place.line == 2


def test_every_configuration_of_the_corpus_is_read_or_refused_with_a_sentence() -> None:
    corpus = os.environ.get("HEADGATE_CORPUS")
    if not corpus:
        pytest.skip("HEADGATE_CORPUS names no folder of nginx configurations")
    files = sorted(path for path in Path(corpus).rglob("*") if path.suffix in (".conf", ".types"))
    outcomes = [_outcome(file) for file in files]
    assert set(outcomes) == {"read", "refused"}
    assert outcomes.count("read") > outcomes.count("refused") > 0


def _outcome(file: Path) -> str:
    try:
        parse(str(file), DiskReader())
    except ConfSyntaxError as error:
        return "refused" if error.place else "refused without a place"
    return "read"


@pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "")
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10", 10),
        ("1m30s", 90),
        ("1m  30s", 90),
        ("1m 30", 90),
        ("1s5", 6),
        ("1s 5", 6),
        ("5 ", 5),
        ("1000000000000s", 10**12),
        ("1y1M1w1d1h1m1s", 34822861),
        ("m5", 5),
        ("9223372036854775808", None),
        ("", None),
        (" 1m", None),
        ("5s ", 5),
        ("5 5s", None),
        ("5 5", 10),
        ("s", None),
        ("500ms", None),
        ("30s1m", None),
        ("1m1m", None),
        ("1x", None),
        ("-1", None),
    ],
)
def test_a_time_is_what_nginx_takes_for_one(tmp_path: Path, text: str, seconds: int | None) -> None:
    conf = tmp_path / "nginx.conf"
    conf.write_text(f'pid x.pid; events {{}} http {{ upstream a {{ server 127.0.0.1:1 "fail_timeout={text}"; }} }}')
    command = ["nginx", "-t", "-q", "-p", str(tmp_path), "-c", str(conf), "-e", "stderr"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is (seconds is not None), done.stderr
    assert duration_seconds(text) == seconds


def test_a_name_that_is_no_utf_8_keeps_its_upstream_from_being_managed() -> None:
    text = f"http {{ upstream app {{ server unix:/tmp/caf\udce9.sock; {HOOK} }} }}"
    (block,) = read(text).upstreams
    assert block.servers[0].unix == "/tmp/caf\udce9.sock"
    assert block.obstacle == (
        r"/etc/nginx.conf:1: unix:/tmp/caf\udce9.sock is no UTF-8, and Headgate cannot manage it; rename that socket"
    )
    text = text.replace("caf\udce9.sock", "a.sock").replace("app", "caf\udce9")
    assert "has a name that is no UTF-8" in read(text).upstreams[0].obstacle
