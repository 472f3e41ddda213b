"""nginx configurations for tests of reading and editing: other people's, and random ones. No test stands here."""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import strategies as st

from controller.conf.index import Look

CORPUS = os.environ.get("HEADGATE_CORPUS")
needs_corpus = pytest.mark.skipif(not CORPUS, reason="HEADGATE_CORPUS names no folder of configurations")

ADDRESSES = ("127.0.0.1:8001", "10.0.0.2:8002", "[::1]:8003", "unix:/run/a b.sock", "app.example", "host:1")
addresses = st.sampled_from(ADDRESSES[:2] * 4 + ADDRESSES)
PARAMETERS = (
    "weight=2",
    "weight=10",
    "max_fails=0",
    "fail_timeout=5s",
    "max_conns=7",
    "down",
    "backup",
    "slow_start=3s",
)
BALANCER = 'balancer_by_lua_block { require("headgate").balance("%s") }'


def corpus_files() -> list[Path]:
    """Every file of the corpus that may be a configuration."""
    return sorted(path for path in Path(CORPUS or os.devnull).rglob("*") if path.is_file() and path.suffix != ".md")


@dataclass
class Files:
    """A reader of bytes by path; `links` are symbolic links."""

    files: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    def look(self, path: str) -> Look:
        path = posixpath.normpath(path)
        return Look(self.links.get(path, path), None)

    def read(self, path: str) -> bytes:
        try:
            return self.files[self.look(path).real]
        except KeyError:
            raise FileNotFoundError(2, "No such file or directory", path) from None

    def glob(self, pattern: str) -> list[str]:
        wanted = re.compile(re.escape(pattern).replace(r"\*", "[^/]*"))
        return sorted(path for path in (*self.files, *self.links) if wanted.fullmatch(path))


# What stands between two words, and what may stand where nothing need stand.
gaps = st.sampled_from([" ", " ", " ", "\t", "  ", "\n        ", "\r\n  ", " # it's; } {\n ", "\n#\n\t"])
loose = st.sampled_from(["", "", "", " ", "\n", "\r\n\r\n", "\t", ' # " not a quote\n', "\n    # комментарий\n    "])
line_ends = st.sampled_from(["\n    ", "\n    ", "\n\t", "\r\n  ", " ", "", "  # x\n    ", "\n\n"])


@st.composite
def written(draw: st.DrawFn, value: str) -> str:
    """A word that nginx reads as `value`: bare, quoted, or with needless escapes."""
    forms = [f'"{value}"', f"'{value}'"] + [value] * 3 * (re.search(r"[\s;{}\"'#\\]", value) is None)
    return draw(st.sampled_from(forms))


@st.composite
def lua_bodies(draw: st.DrawFn) -> str:
    """The body of a Lua block, with every brace where Lua counts it or does not."""
    parts = [
        'local a = "}" ',
        "b = '{\\'' ",
        "-- }} it's\n",
        "--[[ } ]] ",
        "c = [[ { ]] ",
        "d = [=[ ]] } ]=] ",
        "{ e = {} }",
        "f[g[1]] ",
    ]
    return " " + "".join(draw(st.lists(st.sampled_from(parts), max_size=5)))


@st.composite
def noise(draw: st.DrawFn) -> str:
    """A directive of no interest."""
    body = draw(lua_bodies())
    return draw(
        st.sampled_from(
            [
                "tcp_nopush on;",
                "log_format main '$remote_addr \"$request\" {;}';",
                "map $http_upgrade $connection { default upgrade; '' close; }",
                'server { listen 80; location ~ "^/a{2}" { return 200 "up}"; } }',
                "server { set $x ${host}_y; if ($x ~ \\}) { return 403; } }",
                f"init_by_lua_block {{{body}}}",
                f"server {{ location / {{ content_by_lua_block {{{body}}} }} }}",
                f"server {{ set_by_lua_block $y{{{body}}}listen 81; }}",
            ]
        )
    )


@st.composite
def servers(draw: st.DrawFn) -> str:
    """A `server` line."""
    words = [draw(written(draw(addresses)))]
    words += [draw(written(each)) for each in draw(st.lists(st.sampled_from(PARAMETERS), max_size=3, unique=True))]
    return "server" + "".join(draw(gaps) + each for each in words) + draw(loose) + ";"


@st.composite
def upstreams(draw: st.DrawFn, name: str) -> str:
    """An upstream that includes servers.conf now and then."""
    lines = draw(st.lists(servers(), min_size=1, max_size=4))
    lines += draw(st.lists(st.sampled_from(["include servers.conf;", "include 'parts/*.conf';"]), max_size=1))
    lines = draw(st.permutations(lines))
    lines = draw(st.sampled_from([[], [], ["least_conn;"]])) + lines
    lines += draw(st.sampled_from([[], ["keepalive 8;"], ["keepalive 8;", "least_conn;"], ["keepalive_timeout 5s;"]]))
    lines += draw(st.sampled_from([[], [], [], [BALANCER % name], ["balancer_by_lua_block { }"]]))
    body = "".join(draw(line_ends) + each for each in lines)
    return f"upstream{draw(gaps)}{name}{draw(loose)}{{{body}{draw(line_ends)}}}"


@st.composite
def configurations(draw: st.DrawFn) -> Files:
    """A main file with two upstreams, and two files of servers that they include."""
    blocks = [draw(upstreams("app")), draw(upstreams("b")), *draw(st.lists(noise(), max_size=3))]
    body = "".join(draw(line_ends) + each for each in draw(st.permutations(blocks)))
    head = draw(st.sampled_from(["", "# head\n", "user www;\r\n"]))
    text = f"{head}events {{}}\nhttp{draw(loose)}{{{body}{draw(line_ends)}}}{draw(line_ends)}"
    end = draw(st.sampled_from(["", "", "\n", "# the end", "# caf\xe9"]))
    included = "".join(each + draw(line_ends) for each in draw(st.lists(servers(), max_size=3)))
    files = {"/n/nginx.conf": text.encode() + end.encode("latin-1"), "/n/servers.conf": included.encode()}
    return Files({**files, "/n/parts/one.conf": (draw(servers()) + draw(loose)).encode()})
