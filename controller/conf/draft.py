"""A stretch of a file that is being changed: its splices, what they are meant to change, and the proof of it.

The proof reads the stretch again by nginx's rules and by crossplane's: directives and comments must differ by exactly
what was meant, in both readings. Which stretch and which change does not stand here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from controller.conf.index import Splice
from controller.conf.parse import ConfSyntaxError, Place, RawDirective, raw_directives
from controller.conf.spans import Directive, Word, directives, line_of, skip_gap, tokens, word

# What may follow a directive on the last line of it, and the same with no comment. A carriage return at the very end of
# a file belongs to no line end, and one that we put behind it would swallow it when it goes again.
_REST = re.compile(rb"[ \t]*+(?:\#[^\n]*?)??(?=\r?\n|(?<!\r)\Z)")
_EMPTY_REST = re.compile(rb"[ \t]*+(?=\r?\n|\Z)")
_BLANKS = re.compile(rb"[ \t]*+")
_LINE_END = re.compile(rb"(?:\r?\n)?")


class Reason(StrEnum):
    """Why an edit was refused; docs/editing.md explains each."""

    NO_HTTP = "no_http"
    NO_UPSTREAM = "no_upstream"
    NO_SERVER = "no_server"
    NOT_THERE = "not_there"
    EXISTS = "exists"
    AMBIGUOUS = "ambiguous"
    SHARED = "shared"
    FOREIGN_HOOK = "foreign_hook"
    ORDER = "order"
    LAST_SERVER = "last_server"
    BAD_VALUE = "bad_value"
    CONFLICT = "conflict"
    UNPROVEN = "unproven"


class EditRefused(Exception):
    """Nothing was edited; the message says why and what to do, with file and line where there is one."""

    def __init__(self, reason: Reason, message: str, place: Place | None = None) -> None:
        super().__init__(f"{place}: {message}" if place else message)
        self.reason = reason
        self.place = place


class Node(NamedTuple):
    """A directive as a reading sees it, without its place; a Lua block's body is its last argument."""

    name: str
    args: tuple[str, ...]
    block: tuple[Node, ...] | None = None


class Draft:
    """The changes to the bytes from `start` to `end` of a file, which hold whole directives.

    `directives` are those that can be changed: with `within` the stretch is one block, and they are the ones in it.
    `removed` are the numbers of those that are to go, `begin` is the place of the stretch.
    """

    def __init__(self, path: str, data: bytes, start: int, end: int, *, within: bool) -> None:
        self.path, self.data, self.start, self.end, self.within = path, data, start, end, within
        tree = directives(data, path, start, end)
        self.directives: Sequence[Directive] = (tree[0].block or ()) if within else tree
        self.removed: set[int] = set()
        self.begin = Place(path, line_of(data, start))
        self._opened = tree[0].stop + 1 if within else start
        self._words = tree[0].words if within else ()
        self._splices: list[Splice] = []
        self._changed: dict[int, list[Callable[[Iterable[str]], list[str]]]] = defaultdict(list)
        self._added: dict[int, list[tuple[bytes, ...]]] = defaultdict(list)

    def place(self, number: int) -> Place:
        """Where a directive stands."""
        return Place(self.path, line_of(self.data, self.directives[number].start))

    def insert(self, words: tuple[bytes, ...], after: int, *, lua: bool = False) -> None:
        """Put a directive behind that one, on a line of its own where that one ends its line; -1: at the beginning.

        With `lua`, the last of the words is the body of a Lua block.
        """
        if after >= 0:
            anchor = self.directives[after]
            position, indent = anchor.end, self._indent(anchor.start)
        else:
            position, indent = self._opened, self._inner_indent()
        rest, separator = _REST.match(self.data, position), b" "
        if indent is not None and rest:
            position = rest.end()
            separator = self._line_end(position) + indent
        text = b" ".join(map(word, words[:-1] if lua else words))
        text += b" {" + words[-1] + b"}" if lua else b";"
        self._splices.append(Splice(position, position, separator + text))
        self._added[after].append(words)

    def remove(self, number: int) -> None:
        """Take a directive out, together with its line where it stands alone on one; comments beside it stay."""
        start, end = self.directives[number].start, self.directives[number].end
        lead, rest = self._lead(start), _EMPTY_REST.match(self.data, end)
        if lead is None:
            while self.data[start - 1] in b" \t":
                start -= 1
        elif rest is None:
            end = _end(_BLANKS, self.data, end)
        else:
            start, end = start - len(lead), rest.end()
            above = b"\r\n" if self.data[start - 2 : start] == b"\r\n" else self.data[max(start - 1, 0) : start]
            below = self.data[end : _end(_LINE_END, self.data, end)]
            # The line end above goes, so that a file which ended without one does so again; but not where the one below
            # would make another comment of that above.
            if above and below in (above, b""):
                start -= len(above)
            else:
                end += len(below)
        self._splices.append(Splice(start, end, b""))
        self.removed.add(number)

    def set_parameter(self, number: int, name: str, value: str | None) -> None:
        """Give a directive `name=value`, or the flag `name` where the value is empty; None takes it away.

        A parameter that stands there several times is changed everywhere.
        """
        words = self.directives[number].words
        found = [at for at in range(2, len(words)) if _is(words[at].value.decode("latin-1"), name)]
        for at in found:
            if value is None:
                self._splices.append(Splice(self._gap_before(words, at), words[at].end, b""))
            elif value:
                quote = self.data[words[at].start] in b"\"'"
                start, end = words[at].start + quote + len(name) + 1, words[at].end - quote
                self._splices.append(Splice(start, end, value.encode()))
        if value is not None and not found:
            end = words[-1].end
            self._splices.append(Splice(end, end, f" {_parameter(name, value)}".encode()))
        self._changed[number].append(lambda args: _with_parameter(args, name, value))

    def splices(self) -> list[Splice]:
        """All splices that change something, in order; EditRefused when two touch the same bytes."""
        ordered: list[Splice] = []
        done = self.start
        for start, end, text in sorted(self._splices, key=lambda splice: splice[:2]):
            if not text and ordered and not ordered[-1].text:
                start = max(start, done)  # two directives that go may take the same blanks along
            if start < done:
                place = Place(self.path, line_of(self.data, start))
                raise EditRefused(Reason.CONFLICT, "two edits touch the same bytes; make one after the other", place)
            done = max(end, start)
            if self.data[start:done] != text:
                ordered.append(Splice(start, done, text))
        return ordered

    def prove(self, after: bytes, start: int, end: int) -> None:
        """Hold what stands in `after` from `start` to `end` against what was meant; EditRefused."""
        try:
            flaw = self._flaw(after, start, end)
        except (ConfSyntaxError, RecursionError) as error:
            flaw = f"it cannot be read ({error})"
        if flaw:
            message = f"the edit is not proved to be the one meant: {flaw}; edit by hand"
            raise EditRefused(Reason.UNPROVEN, message, self.begin)

    def _flaw(self, after: bytes, start: int, end: int) -> str | None:
        codec = _codec(self.data[self.start : self.end] + after[start:end])
        tree = directives(after, self.path, start, end)
        mine, now = _nodes(self.directives, codec), _nodes((tree[0].block or ()) if self.within else tree, codec)
        if self._meant(mine, 0, codec) != now or (self.within and [each.words for each in tree] != [self._head(start)]):
            return "other directives than meant would change"
        comments = [
            after[first:last] for kind, first, last in tokens(after, self.path, start, end) if kind == "comment"
        ]
        if comments != self._kept_comments():
            return "comments would change"
        # crossplane is slow: it reads from the first directive that changes to the last one.
        touched = {*self._changed, *self.removed, *self._added}
        first, last = max(min(touched), 0), max(touched)
        begin = self.directives[first - 1].end if first else self._opened
        rest = self.directives[last + 1].start if last + 1 < len(self.directives) else self.end - self.within
        theirs = _crossplane(self.data[begin:rest], codec)
        known = mine[first : last + 1]
        if [node.name for node in theirs] != [node.name for node in known] or any(
            theirs[number - first].args != mine[number].args for number in (*self._changed, *self.removed)
        ):
            return "crossplane does not read these lines as nginx does"
        changed = after[start + begin - self.start : end + rest - self.end]
        if self._meant(theirs, first, codec) != _crossplane(changed, codec):
            return "crossplane sees other changes than meant"
        return None

    def _meant(self, nodes: Iterable[Node], first: int, codec: str) -> tuple[Node, ...]:
        """What a reading should be afterwards that was `nodes`, of which the first has the number `first`."""
        out = [] if first else self._new(-1, codec)
        for number, node in enumerate(nodes, first):
            for change in self._changed.get(number, ()):
                node = node._replace(args=(node.args[0], *change(node.args[1:])))
            out += [] if number in self.removed else [node]
            out += self._new(number, codec)
        return tuple(out)

    def _new(self, after: int, codec: str) -> list[Node]:
        many = self._added.get(after, ())
        return [Node(name.decode(codec), tuple(arg.decode(codec) for arg in args)) for name, *args in many]

    def _head(self, start: int) -> tuple[Word, ...]:
        """The words that open the block, where it begins at `start`."""
        moved = start - self.start
        return tuple(Word(each.start + moved, each.end + moved, each.value) for each in self._words)

    def _kept_comments(self) -> list[bytes]:
        gone = [self.directives[number] for number in self.removed]
        return [
            self.data[start:end]
            for kind, start, end in tokens(self.data, self.path, self.start, self.end)
            if kind == "comment" and not any(each.start <= start < each.end for each in gone)
        ]

    def _lead(self, position: int) -> bytes | None:
        """The blanks before `position` if nothing else stands before it on its line."""
        lead = self.data[self.data.rfind(b"\n", 0, position) + 1 : position]
        return None if lead.strip(b" \t") else lead

    def _indent(self, position: int) -> bytes | None:
        """The blanks at the beginning of the line of `position`; None where the block was not yet open there."""
        line = self.data.rfind(b"\n", 0, position) + 1
        return self.data[line : _end(_BLANKS, self.data, line)] if line >= self._opened else None

    def _inner_indent(self) -> bytes | None:
        """How the first line of the block is indented, or would be."""
        first = skip_gap(self.data, self._opened)
        if self.data[first : first + 1] not in (b"}", b""):
            return self._indent(first)
        line = self.data.rfind(b"\n", 0, self._opened) + 1
        lead = self.data[line : _end(_BLANKS, self.data, line)]
        return lead + (b"\t" if b"\t" in lead else b"    ")

    def _line_end(self, position: int) -> bytes:
        """The line end at `position`, at the end of the file that of the line before."""
        if position == len(self.data):
            position = max(self.data.rfind(b"\n"), 0)
            position -= self.data[position - 1 : position] == b"\r"
        return self.data[position : _end(_LINE_END, self.data, position)] or b"\n"

    def _gap_before(self, words: Sequence[Word], at: int) -> int:
        """Where the blanks before a word begin that go with it; the line end of a comment stays."""
        start = words[at - 1].end
        gap = self.data[start : words[at].start]
        return start + gap.rfind(b"\n") + 1 if b"#" in gap else start


def _end(pattern: re.Pattern[bytes], data: bytes, start: int) -> int:
    match = pattern.match(data, start)
    return match.end() if match else start


def _parameter(name: str, value: str) -> str:
    return f"{name}={value}" if value else name


def _is(parameter: str, name: str) -> bool:
    return parameter == name if name in ("down", "backup") else parameter.startswith(f"{name}=")


def _with_parameter(args: Iterable[str], name: str, value: str | None) -> list[str]:
    args = list(args)
    if value is None:
        return [each for each in args if not _is(each, name)]
    if not any(_is(each, name) for each in args):
        return [*args, _parameter(name, value)]
    return [_parameter(name, value) if _is(each, name) else each for each in args]


def _codec(data: bytes) -> str:
    try:
        data.decode()
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def _nodes(tree: Sequence[Directive], codec: str) -> tuple[Node, ...]:
    return tuple(
        Node(
            each.name.decode(codec),
            tuple(arg.decode(codec) for arg in (*each.args, *([] if each.lua is None else [each.lua]))),
            None if each.block is None else _nodes(each.block, codec),
        )
        for each in tree
    )


def _crossplane(data: bytes, codec: str) -> tuple[Node, ...]:
    def nodes(tree: Sequence[RawDirective]) -> tuple[Node, ...]:
        return tuple(
            Node(each.name, tuple(each.args), None if each.block is None else nodes(each.block)) for each in tree
        )

    return nodes(raw_directives("crossplane", data.decode(codec).encode()))
