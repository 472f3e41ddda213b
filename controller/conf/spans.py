"""nginx's own reading rules over bytes: every byte belongs to one token, and every directive knows where it stands.

The rules are those of nginx's `ngx_conf_read_token`, and those of the Lua module for the bodies of its `_by_lua_block`
directives. What directives mean does not stand here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from controller.conf.parse import ConfSyntaxError, Place

LONGEST = 4000
"""Bytes of a word that nginx takes wherever it stands."""

_BUFFER = 4096  # NGX_CONF_BUFFER

_BLANK = rb"[ \t\r\n]++"
_COMMENT = rb"\#[^\n]*+"
_GAP = rb"(?:" + _BLANK + rb"|" + _COMMENT + rb")*+"
_QUOTED = rb"""(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"|'[^'\\]*+(?:\\.[^'\\]*+)*+')"""
_BARE = rb"""(?:[^\ \t\r\n;{}\#"'\\$]|\\.|\${*+)(?:[^\ \t\r\n;{\\$]++|\\.|\${*+)*+"""
_WORD = rb"(?:" + _QUOTED + rb"(?=[ \t\r\n;{)])|" + _BARE + rb")"

_PIECE = re.compile(b"(" + _BLANK + b")|(" + _COMMENT + b")|(" + _QUOTED + b"|" + _BARE + b")", re.DOTALL)
_PIECES = ("", "blank", "comment", "word")
_GAP_ONLY = re.compile(_GAP)
_STATEMENT = re.compile(
    _GAP + rb"(?:(" + _WORD + rb")(?:" + _GAP + _WORD + rb")*+" + _GAP + rb"([;{])|(\})|\Z)", re.DOTALL
)
_LUA = re.compile(
    rb"""(?P<long>(?:--)?\[(?P<level>=*)\[)|--[^\n]*+|"(?:[^"\\\n]|\\[^\n])*+"|'(?:[^'\\\n]|\\[^\n])*+'|(?P<brace>[{}])""",
    re.DOTALL,
)
_ESCAPE = re.compile(rb"""\\(["'\\trn])""")
_ESCAPED = {b"t": b"\t", b"r": b"\r", b"n": b"\n"}


class Token(NamedTuple):
    """A run of bytes. `kind` is blank, comment, word, lua (a Lua block without its braces), `;`, `{` or `}`."""

    kind: str
    start: int
    end: int


class Statement(NamedTuple):
    """A directive up to its `;` or `{`, or the `}` that ends a block.

    `name` is the first word as written, empty for `}`; it stands at `start`. `kind` is `;`, `{`, `}` or lua; the byte
    that ends the statement's words stands at `stop`. A Lua block belongs to its statement, so `end` is behind its `}`.
    """

    kind: str
    name: bytes
    start: int
    stop: int
    end: int


@dataclass(frozen=True, slots=True)
class Word:
    """A name or an argument: where it stands, quotes included, and its value as nginx sees it."""

    start: int
    end: int
    value: bytes


@dataclass(frozen=True, slots=True)
class Directive:
    """A directive with its place in the bytes: `;` or `{` at `stop`, `end` behind its `;` or `}`.

    `block` holds the directives of a block; `lua` the body of a Lua block.
    """

    words: tuple[Word, ...]
    stop: int
    end: int
    block: list[Directive] | None = field(default=None, compare=False)
    lua: bytes | None = None

    @property
    def start(self) -> int:
        """Where the name begins."""
        return self.words[0].start

    @property
    def name(self) -> bytes:
        """The name as nginx sees it."""
        return self.words[0].value

    @property
    def args(self) -> tuple[bytes, ...]:
        """The arguments as nginx sees them."""
        return tuple(word.value for word in self.words[1:])


def tokens(data: bytes, path: str, start: int = 0, end: int | None = None) -> Iterator[Token]:
    """All of `data[start:end]` in order and without a gap, offsets in `data`; ConfSyntaxError.

    `start` and `end` stand between directives, and what lies between them is whole: here and in all that follows.
    """
    for kind, _, _, stop, behind in statements(data, path, start, end):
        yield from _pieces(data, start, stop)
        yield Token("{" if kind == "lua" else kind, stop, stop + 1)
        if kind == "lua":
            yield from [Token("lua", stop + 1, behind - 1)] if behind - stop > 2 else []
            yield Token("}", behind - 1, behind)
        start = behind
    yield from _pieces(data, start, len(data) if end is None else end)


def directives(data: bytes, path: str, start: int = 0, end: int | None = None) -> list[Directive]:
    """`data[start:end]` as a tree with offsets in `data`; ConfSyntaxError."""
    root: list[Directive] = []
    outer: list[tuple[list[Directive], tuple[Word, ...], int]] = []
    current = root
    for kind, _, first, stop, behind in statements(data, path, start, end):
        if kind == "}":
            inner, (current, words, opened) = current, outer.pop()
            current.append(Directive(words, opened, behind, inner))
            continue
        words = words_of(data, first, stop)
        if kind == "{":
            outer.append((current, words, stop))
            current = []
        else:
            current.append(Directive(words, stop, behind, lua=data[stop + 1 : behind - 1] if kind == "lua" else None))
    return root


def statements(data: bytes, path: str, start: int = 0, end: int | None = None) -> Iterator[Statement]:
    """The directives of `data[start:end]` one after another, blocks opened and closed in balance; ConfSyntaxError.

    One match of a regular expression a directive: some 3 MB in 0.2 s.
    """
    end = len(data) if end is None else end
    depth = 0
    while True:
        match = _STATEMENT.match(data, start, end)
        if match is None:
            raise _fault(data, path, start, end)
        if match.end() - start >= _BUFFER:
            _check_lengths(data, path, start, match.end())
        name, mark, closing = match.groups()
        start = match.end()
        if mark == b";":
            yield Statement(";", name, match.start(1), start - 1, start)
        elif mark:
            if b"_by_lua_block" in name and value(name).endswith(b"_by_lua_block"):
                stop, start = start - 1, _lua_end(data, path, start, end)
                yield Statement("lua", name, match.start(1), stop, start)
            else:
                depth += 1
                yield Statement("{", name, match.start(1), start - 1, start)
        elif closing:
            depth -= 1
            if depth < 0:
                raise _error('unexpected "}"', data, path, start)
            yield Statement("}", b"", start - 1, start - 1, start)
        elif depth:
            raise _error('unexpected end of file, expecting "}"', data, path, end)
        else:
            return


def words_of(data: bytes, start: int, stop: int) -> tuple[Word, ...]:
    """The words of a statement, which goes from `start` to its mark at `stop`."""
    pieces = (piece for piece in _pieces(data, start, stop) if piece.kind == "word")
    return tuple(Word(start, end, value(data[start:end])) for _, start, end in pieces)


def value(raw: bytes) -> bytes:
    """A word as nginx sees it: without quotes, escapes resolved."""
    if raw[:1] in (b'"', b"'"):
        raw = raw[1:-1]
    return _ESCAPE.sub(lambda found: _ESCAPED.get(found[1], found[1]), raw) if b"\\" in raw else raw


def word(text: bytes) -> bytes:
    """How to write `text` so that nginx reads it as one word: bare where that works, else in double quotes."""
    if len(text) <= LONGEST and re.fullmatch(_BARE, text, re.DOTALL) and b"\\" not in text:
        return text
    return b'"' + re.sub(rb'(["\\])', rb"\\\1", text) + b'"'


def skip_gap(data: bytes, start: int) -> int:
    """Behind the blanks and comments that begin at `start`, which stands between directives."""
    match = _GAP_ONLY.match(data, start)
    assert match is not None
    return match.end()


def line_of(data: bytes, offset: int) -> int:
    """The line on which `offset` stands, from 1."""
    return data.count(b"\n", 0, offset) + 1


def _pieces(data: bytes, start: int, end: int) -> Iterator[Token]:
    """The tokens of a stretch between two marks that is known to be well-formed."""
    for match in _PIECE.finditer(data, start, end):
        yield Token(_PIECES[match.lastindex or 0], match.start(), match.end())


def _lua_end(data: bytes, path: str, start: int, end: int) -> int:
    """Where the Lua block ends whose `{` stands before `start`: behind its `}`."""
    depth, opened = 1, start
    while match := _LUA.search(data, start, end):
        start = match.end()
        if match["long"]:
            closing = b"]" + match["level"] + b"]"
            found = data.find(closing, start, end)
            if found < 0:
                message = f'missing the closing long bracket "{closing.decode()}", the inlined Lua code may be too long'
                raise _error(f"Lua code block {message}", data, path, start)
            start = found + len(closing)
        elif match["brace"] == b"{":
            depth, opened = depth + 1, start
        elif match["brace"]:
            depth -= 1
            if not depth:
                return start
    raise _error("unexpected end of file, expecting terminating characters for lua code block", data, path, opened)


def _check_lengths(data: bytes, path: str, start: int, end: int) -> None:
    """Refuse what nginx's buffer does not hold: a word without its opening quote, but with the blank behind it."""
    for kind, first, behind in _pieces(data, start, end):
        quote = data[first : first + 1] if kind == "word" and data[first] in b"\"'" else b""
        first += len(quote)
        held = behind + (kind == "word" and data[behind : behind + 1] in (b" ", b"\t", b"\r", b"\n")) - first
        if kind == "blank" or held < _BUFFER or first + _BUFFER >= len(data):
            continue
        shown = data[first : first + 10].decode("utf-8", "backslashreplace")
        flaw = f' "{shown}..." started'
        if quote and behind - 1 - first >= _BUFFER:
            flaw = f', probably missing terminating "{quote.decode()}" character'
        raise _error(f"too long parameter{flaw}", data, path, first)


def _fault(data: bytes, path: str, start: int, end: int) -> ConfSyntaxError:
    """What nginx finds wrong with the first statement behind `start`."""
    while match := _PIECE.match(data, start, end):
        closed = data[start] in b"\"'"
        start = match.end()
        if closed and start < end and data[start] not in b" \t\r\n;{)":
            break
    else:
        if start == end or data[start] in b"\"'\\":
            return _error('unexpected end of file, expecting ";" or "}"', data, path, end)
    return _error(f'unexpected "{data[start : start + 1].decode("utf-8", "backslashreplace")}"', data, path, start)


def _error(message: str, data: bytes, path: str, offset: int) -> ConfSyntaxError:
    return ConfSyntaxError(message, Place(path, line_of(data, offset)))
