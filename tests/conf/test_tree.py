"""nginx's files as one tree: includes, places, inheritance, units, and the whole corpus."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from controller.adapters.nginx.files import DiskReader
from controller.conf.parse import ConfSyntaxError
from controller.conf.tree import calls, read, seconds, size
from controller.doctor.checks import examine
from controller.doctor.model import Facts
from tests.doctor.site import CONF, Files


def test_included_directives_stand_where_the_include_does_with_their_own_places() -> None:
    files = Files(
        {
            CONF: "http {\n  include conf.d/*.conf;\n  server { location / { include /x/proxy.conf; } }\n}\n",
            "/etc/nginx/conf.d/a.conf": "# first\r\ngzip on;",
            "/etc/nginx/conf.d/b.conf": 'gzip_types "a b";',
            "/x/proxy.conf": "\n\nproxy_pass http://app;",
        }
    )
    http = read(CONF, files).own("http")[0]
    assert [(node.name, node.args, str(node.place)) for node in http.block or ()][:2] == [
        ("gzip", ("on",), "/etc/nginx/conf.d/a.conf:2"),
        ("gzip_types", ("a b",), "/etc/nginx/conf.d/b.conf:1"),
    ]
    (proxy,) = http.find("proxy_pass")
    assert str(proxy.place) == "/x/proxy.conf:3"
    assert [node.args for node in proxy.inherited("gzip")] == [("on",)]
    server = proxy.within("server")
    assert server is not None
    assert str(server.place) == f"{CONF}:3"
    assert proxy.within("upstream") is None


def test_the_nearest_block_hides_what_stands_further_out() -> None:
    headers = "proxy_set_header A 1; proxy_set_header B 2;"
    text = f"http {{ {headers} server {{ proxy_set_header C 3; location / {{ proxy_pass x; }} }} }}"
    (proxy,) = read(CONF, Files({CONF: text})).find("proxy_pass")
    assert [node.args for node in proxy.inherited("proxy_set_header")] == [("C", "3")]


def test_lua_is_taken_from_blocks_strings_and_absolute_files() -> None:
    text = (
        "http { log_by_lua_block { a = '}' } server { log_by_lua 'b = 1'; } server { log_by_lua_file /c.lua; }"
        " server { log_by_lua_file d.lua; } server { log_by_lua_file /missing.lua; } }"
    )
    nodes = read(CONF, Files({CONF: text, "/c.lua": "c"})).find("log_by_lua_block", "log_by_lua", "log_by_lua_file")
    assert [node.lua for node in nodes] == [" a = '}' ", "b = 1", "c", None, None]


@pytest.mark.parametrize(
    ("lua", "is_call"),
    [
        ('require("headgate").log()', True),
        ("local h = require 'headgate'\nh.log()", True),
        ('-- require("headgate").log()', False),
        ('--[[ require("headgate").log() ]] x = 1', False),
        ('require("headgate").balance("log")', False),
        ('require("other").log()', False),
    ],
)
def test_a_call_of_headgate_is_told_from_a_mention(lua: str, is_call: bool) -> None:
    assert calls(lua, "log") is is_call


def test_what_cannot_be_read_is_named_with_its_place() -> None:
    for files, told in (
        ({}, CONF),
        ({CONF: "http {\n\ninclude gone.conf; }"}, f"{CONF}:3"),
        ({CONF: "http {\ninclude nginx.conf; }"}, f"itself in {CONF}:2"),
        ({CONF: "http {\n"}, f'expecting "}}" in {CONF}:2'),
        ({CONF: "a {" * 3000 + "}" * 3000}, "nested too deeply"),
    ):
        with pytest.raises(ConfSyntaxError) as caught:
            read(CONF, Files(files))
        assert told in str(caught.value)


def test_times_and_sizes_are_read_as_nginx_writes_them() -> None:
    assert [seconds(text) for text in ("60", "2s", "1m", "1m 30s", "500ms", "1h30m", "soon", "")] == [
        *(60.0, 2.0, 60.0, 90.0, 0.5, 5400.0),
        *(None, None),
    ]
    assert [size(text) for text in ("1024", "8k", "8M", "1g", "many")] == [1024, 8192, 8 << 20, 1 << 30, None]


def test_no_file_of_the_corpus_upsets_the_tree_or_a_check() -> None:
    corpus = os.environ.get("HEADGATE_CORPUS")
    if corpus is None:
        pytest.skip("HEADGATE_CORPUS names no directory of configurations")
    read_files, refused = 0, 0
    for path in sorted(path for path in Path(corpus).rglob("*") if path.suffix in (".conf", ".types")):
        try:
            root = read(str(path), DiskReader())
        except ConfSyntaxError as error:
            refused += 1
            facts = Facts(broken=error)
        else:
            read_files += 1
            facts = Facts(conf=root)
        for finding in examine(facts):
            assert finding.message
    assert read_files > 40
    assert 0 < refused < read_files
