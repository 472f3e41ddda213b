"""controller.conf.spans: every byte in one token, words as nginx sees them, errors as nginx words them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crossplane
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.conf.parse import ConfSyntaxError
from controller.conf.spans import Directive, directives, line_of, statements, tokens, value, word
from tests.support.confs import Files, configurations, corpus_files, lua_bodies, needs_corpus
from tests.support.nginx import MODULES, missing_parts


def joined(data: bytes) -> bytes:
    return b"".join(data[start:end] for _, start, end in tokens(data, "f"))


def shape(tree: list[Directive]) -> list[Any]:
    return [(each.name, *each.args, *([shape(each.block)] if each.block is not None else [])) for each in tree]


def error_of(data: bytes) -> str | None:
    try:
        directives(data, "f")
    except ConfSyntaxError as error:
        return str(error)
    return None


@needs_corpus
@pytest.mark.parametrize("path", corpus_files(), ids=str)
def test_every_byte_of_a_file_belongs_to_one_token(path: Path) -> None:
    data = path.read_bytes()
    if error := error_of(data):
        assert re.fullmatch(r"unexpected .+ in f:\d+", error)
        with pytest.raises(ConfSyntaxError, match=re.escape(error)):
            list(tokens(data, "f"))
    else:
        assert joined(data) == data
        assert all(token.start < token.end for token in tokens(data, "f"))


@given(st.lists(st.sampled_from([*"ab \n\t\r;{}\"'\\#$()", "${", "\xff", "\0", "\ufeff", "x y;", "x_by_lua_block {"])))
@settings(max_examples=500)
def test_random_bytes_are_read_without_a_gap_or_refused_with_a_line(parts: list[str]) -> None:
    data = "".join(parts).encode("utf-8", "surrogateescape")
    if (error := error_of(data)) is None:
        assert joined(data) == data
    else:
        assert 1 <= int(error.rpartition(":")[2]) <= data.count(b"\n") + 1


@given(configurations())
@settings(max_examples=200)
def test_random_configurations_are_read_without_a_gap(files: Files) -> None:
    for data in files.files.values():
        assert joined(data) == data
        for kind, name, start, stop, end in statements(data, "f"):
            assert data[start : start + len(name)] == name
            assert data[stop : stop + 1] == (b"{" if kind == "lua" else kind.encode())
            assert data[end - 1 : end] in (b";", b"{", b"}")


@given(lua_bodies())
def test_a_lua_block_ends_where_lua_says(body: str) -> None:
    data = f"content_by_lua_block{{{body}}}after;".encode()
    block, after = directives(data, "f")
    assert (block.lua, after.name) == (body.encode(), b"after")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a b  c;", [(b"a", b"b", b"c")]),
        (b"a\tb\r\nc ;", [(b"a", b"b", b"c")]),
        (b"a 'b c' \"d;{\";", [(b"a", b"b c", b"d;{")]),
        (b"a b'c\"d#e;", [(b"a", b"b'c\"d#e")]),
        (b"a # b;\n c;", [(b"a", b"c")]),
        (b"a ${b}c $d{", None),
        (b"a ${b}c ${{d};", [(b"a", b"${b}c", b"${{d}")]),
        (b"a b\\;c\\ d;", [(b"a", b"b\\;c\\ d")]),
        (rb"""a "\"\\\t\n\r\x" '\'' \"\t;""", [(b"a", b'"\\\t\n\r\\x', b"'", b'"\t')]),
        (b'a "b")c;', [(b"a", b"b", b")c")]),
        (b"a b}c;", [(b"a", b"b}c")]),
        (b"a{b;c{}}", [(b"a", [(b"b",), (b"c", [])])]),
        (b'"a"{}', [(b"a", [])]),
        (b"\xef\xbb\xbfa;\xff \x00;", [(b"\xef\xbb\xbfa",), (b"\xff", b"\x00")]),
        (b"", []),
        (b"# only a comment", []),
    ],
)
def test_words_are_what_nginx_sees(text: bytes, expected: list[Any] | None) -> None:
    if expected is None:
        assert error_of(text) == 'unexpected end of file, expecting "}" in f:1'
    else:
        assert shape(directives(text, "f")) == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a", 'unexpected end of file, expecting ";" or "}" in f:1'),
        ("a {\n b;\n", 'unexpected end of file, expecting "}" in f:3'),
        ("a;\n}", 'unexpected "}" in f:2'),
        ("a {\n b }\n", 'unexpected "}" in f:2'),
        (";", 'unexpected ";" in f:1'),
        ("\n{", 'unexpected "{" in f:2'),
        ("a 'b'c;", 'unexpected "c" in f:1'),
        ("a 'b'#c\n;", 'unexpected "#" in f:1'),
        ("a 'b\n;", 'unexpected end of file, expecting ";" or "}" in f:2'),
        ("a b\\", 'unexpected end of file, expecting ";" or "}" in f:1'),
        (
            "a_by_lua_block {\n{ \n}",
            "unexpected end of file, expecting terminating characters for lua code block in f:2",
        ),
        (
            "\na_by_lua_block { [==[ ]=] }",
            'Lua code block missing the closing long bracket "]==]", the inlined Lua code may be too long in f:2',
        ),
        ("a\n" + "b" * 4096 + ";", 'too long parameter "bbbbbbbbbb..." started in f:2'),
        ("a '" + "b" * 4095 + "';", 'too long parameter "bbbbbbbbbb..." started in f:1'),
        ("a '" + "b" * 4096 + "';", 'too long parameter, probably missing terminating "\'" character in f:1'),
        ("#" * 4097, 'too long parameter "##########..." started in f:1'),
    ],
)
def test_errors_are_those_of_nginx(text: str, error: str) -> None:
    assert error_of(text.encode()) == error


@given(st.binary(max_size=12))
def test_a_word_is_written_so_that_it_is_read_as_itself(text: bytes) -> None:
    assert value(word(text)) == text
    assert directives(b"a " + word(text) + b";", "f")[0].args == (text,)


def test_a_tree_knows_where_everything_stands() -> None:
    data = b"x;\n a 'b' {\n  c d ;\n}"
    _, block = directives(data, "f")
    assert block.block is not None
    (inner,) = block.block
    assert [data[each.start : each.end] for each in block.words] == [b"a", b"'b'"]
    assert (data[block.stop : block.stop + 1], data[block.start : block.end]) == (b"{", data[4:])
    assert (data[inner.start : inner.end], line_of(data, inner.start)) == (b"c d ;", 3)


@needs_corpus
@pytest.mark.parametrize("path", corpus_files(), ids=str)
def test_crossplane_sees_the_same_directives_on_the_same_lines(path: Path) -> None:
    read = crossplane.parse(str(path), single=True, check_ctx=False, check_args=False)["config"][0]
    data = path.read_bytes()
    # Where nginx gives up, crossplane may go on.
    if flaw := error_of(data) or read["errors"]:
        pytest.skip(f"it is broken: {flaw}")

    def seen(name: str, args: list[str], line: int, block: list[Any]) -> tuple[Any, ...]:
        # crossplane takes the parentheses of `if` away, and reads the two words `${a} b` as one.
        said = " ".join(args)
        return name, re.sub(r"^\(\s*|\s*\)$", "", said) if name == "if" else said, line, block

    def unescaped(directive: dict[str, Any]) -> list[str]:
        # crossplane leaves escapes as they are.
        *args, last = directive["args"] or [""]
        lua = directive["directive"].endswith("_by_lua_block")
        args = [value(b"'" + arg.encode() + b"'").decode() for arg in (args if lua else directive["args"])]
        return [*args, last] if lua else args

    def ours(tree: list[Directive]) -> list[Any]:
        return [
            seen(
                each.name.decode(),
                [arg.decode("utf-8", "replace") for arg in each.args] + ([each.lua.decode()] if each.lua else []),
                line_of(data, each.start),
                ours(each.block or []),
            )
            for each in tree
        ]

    def theirs(tree: list[dict[str, Any]]) -> list[Any]:
        return [
            seen(each["directive"], unescaped(each), each["line"], theirs(each.get("block", [])))
            for each in tree
            if each["directive"] != "#"
        ]

    assert ours(directives(data, "f")) == theirs(read["parsed"])


@pytest.fixture(scope="module")
def nginx_says(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], str | None]:
    """What `nginx -t` finds first, or None."""
    if missing := missing_parts():
        pytest.skip(missing)
    prefix = tmp_path_factory.mktemp("nginx")
    (prefix / "logs").mkdir()
    conf = prefix / "f"

    def say(data: bytes) -> str | None:
        conf.write_bytes(data)
        command = ["nginx", "-t", "-q", "-p", str(prefix), "-c", str(conf), "-e", "stderr"]
        ran = subprocess.run(command, capture_output=True, timeout=20, check=False)
        said = ran.stderr.decode("utf-8", "backslashreplace").replace(str(conf), "f")
        found = re.search(r"\[emerg\] (?:\d+#\d+: )?(.*?)\nnginx: ", said, re.DOTALL)
        assert (found is None) == (ran.returncode == 0), said
        return found[1] if found else None

    return say


TYPES = b"pid n.pid; events {}\nhttp { types_hash_max_size 8192; types_hash_bucket_size 8192; types {\n"
LUA = b"".join(
    b"load_module %s/%s.so;" % (bytes(MODULES), name) for name in (b"ndk_http_module", b"ngx_http_lua_module")
)
LOCATION = LUA + b"pid n.pid; events {}\nhttp { server { location / { content_by_lua_block {x"


def we_say(data: bytes, depth_of_types: int | None) -> str | None:
    """What nginx would say: it stops at the first directive that it does not know, and in `types` at every block."""
    known = (b"load_module", b"pid", b"events", b"http", b"server", b"location", b"content_by_lua_block")
    depth = 0
    try:
        for kind, name, _, stop, _ in statements(data, "f"):
            if depth == depth_of_types and kind in ("{", "lua"):
                return f'unexpected "{{" in f:{line_of(data, stop)}'
            if kind != "}" and depth != depth_of_types and not name.startswith(b"types") and name not in known:
                shown = value(name).partition(b"\0")[0].decode("utf-8", "backslashreplace")
                return f'unknown directive "{shown}" in f:{line_of(data, stop)}'
            depth += (kind == "{") - (kind == "}")
    except ConfSyntaxError as error:
        return str(error)
    return None


@given(
    st.lists(
        st.sampled_from([*"ab;;\"'\\#$}){", " ", " ", "\n", "\t", "\r", "${", '\\"', "\0", "x y;", '"q" ']), max_size=14
    )
)
@settings(max_examples=150, deadline=None)
def test_nginx_itself_takes_and_refuses_the_same_words(
    nginx_says: Callable[[bytes], str | None], parts: list[str]
) -> None:
    data = TYPES + "".join(parts).encode() + b"\n} unknown; }\n"
    assert we_say(data, 2) == nginx_says(data)


@given(
    st.lists(st.sampled_from([*"{}\"'\\\n[=;-#", "--", "[[", "]]", "[=[", "]=]", "a ", "--[[", "\\\n"]), max_size=12)
)
@settings(max_examples=150, deadline=None)
def test_nginx_itself_ends_lua_blocks_at_the_same_brace(
    nginx_says: Callable[[bytes], str | None], parts: list[str]
) -> None:
    data = LOCATION + "".join(parts).encode() + b"}\nunknown; } } }\n"
    assert we_say(data, None) == nginx_says(data)


@pytest.mark.parametrize("form", ["a %s;", "a %s ;", "a '%s';", "a '%s'\n;", "a '%s')b;", "#%s\n", "a #%s\n;"])
def test_nginx_itself_takes_words_of_the_same_length(nginx_says: Callable[[bytes], str | None], form: str) -> None:
    for size in range(4091, 4098):
        data = TYPES + (form % ("w" * size)).encode() + b"\n} unknown; }\n"
        assert we_say(data, 2) == nginx_says(data)


@needs_corpus
@pytest.mark.parametrize(
    "name", ["missing-semicolon/broken-above.conf", "missing-semicolon/broken-below.conf", "quote-behavior/nginx.conf"]
)
def test_nginx_itself_refuses_the_broken_files_of_the_corpus_for_the_same_reason(
    nginx_says: Callable[[bytes], str | None], name: str
) -> None:
    (path,) = [path for path in corpus_files() if str(path).endswith(name)]
    assert error_of(path.read_bytes()) == nginx_says(path.read_bytes())
