"""Where the upstreams, the http block and the includes of a configuration stand, held so that an edit searches nothing.

One quick pass over each file finds them. What a file means depends on where it is included. Reading and changing the
lines of an upstream does not stand here.
"""

from __future__ import annotations

import posixpath
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from controller.conf.parse import ConfSyntaxError, Place, Reader, is_pattern
from controller.conf.spans import line_of, statements, value, words_of

Context = tuple[bytes, ...]
"""What encloses a directive: (), (b"http",), (b"http", b"NAME") inside that upstream; the same with b"stream"."""


class Look(NamedTuple):
    """Where a file really is, without symbolic links, and a stamp that its content does not change under.

    `stamp` is None where it may, so that the file must be read: it is gone, or was written a moment ago.
    """

    real: str
    stamp: object


def encoded(text: str) -> bytes:
    """The bytes of a name or path, which may come from a file that is no UTF-8."""
    return text.encode("utf-8", "surrogateescape")


class Files(Reader, Protocol):
    """A reader that can look at a file without reading it."""

    def look(self, path: str) -> Look:
        """The same stamp again means the same content, for a directory the same names."""


class Splice(NamedTuple):
    """The bytes from `start` to `end` become `text`."""

    start: int
    end: int
    text: bytes


class Section(NamedTuple):
    """An http, stream or upstream block, or an include at their level.

    `name` is the upstream's name or the include's pattern. The section goes from `start` to `end`, with its `{` or `;`
    at `stop`; `outer` is the number of the section around it in the same file, -1 for none.
    """

    kind: bytes
    name: bytes
    start: int
    stop: int
    end: int
    outer: int


class Index:
    """The files that nginx would read, each with its sections. Reads all of them at once; ConfSyntaxError.

    A file that is reached under several names has the first of them in here.

    With `known`, files whose stamp is still the same are not read, and those with the same content not scanned again.
    """

    def __init__(self, main: str, reader: Files, known: Index | None = None) -> None:
        self.main = main
        self._reader = reader
        self._known, self._known_looks = (known._files, known._looks) if known else ({}, {})
        self._files: dict[str, tuple[bytes, tuple[Section, ...]]] = {}
        self._looks: dict[str, Look] = {}
        self._globs: dict[str, tuple[Look, Sequence[str]]] = {}
        self._walk()
        self._known, self._known_looks = {}, {}

    def current(self, reader: Files, *, whole: bool = False) -> Index:
        """This index where its upstreams stand as they did, else one that is read from `reader` with its help.

        Files in which nothing of an upstream stands, like those of ten thousand sites, are looked at for the `whole`
        alone: what they hold now may be a new upstream, but nothing that nginx takes can change one of these.
        """
        looks = {path: reader.look(path) for path in (self._looks if whole else self._concerned)}
        again = [path for path, look in looks.items() if look != self._looks[path] or look.stamp is None]
        if not all(self._same(path, reader) for path in again) or not self._same_names(reader):
            return Index(self.main, reader, self)
        self._reader = reader
        self._looks.update(looks)
        return self

    def _concerns(self, path: str) -> bool:
        """Whether something of an upstream, or of what is around it, stands in a file."""
        name = self._name(path)
        return bool(self._files[name][1]) or any(len(context) > 1 for context in self._contexts[name])

    def _same_names(self, reader: Files) -> bool:
        """Whether all patterns still match what they did."""
        for pattern, (before, found) in self._globs.items():
            folder = posixpath.dirname(pattern)
            look = reader.look(folder)
            if is_pattern(folder) or look.stamp is None or look != before:
                if list(reader.glob(pattern)) != list(found):
                    return False
                self._globs[pattern] = look, found
        return True

    def _same(self, path: str, reader: Files) -> bool:
        """Whether a file, whatever its stamp says, is where and what it was."""
        try:
            return reader.look(path).real == self._looks[path].real and reader.read(path) == self.data(self._name(path))
        except OSError:
            return False

    def data(self, path: str) -> bytes:
        """The content of a file that was read."""
        return self._files[path][0]

    def contexts(self, path: str) -> frozenset[Context]:
        """In which contexts a file is read."""
        return frozenset(self._contexts[path])

    def holds(self, name: str) -> bool:
        """Whether an upstream of this name is in the http block."""
        return (b"http", encoded(name)) in self._blocks

    def blocks(self, context: Context) -> list[tuple[str, Section]]:
        """The blocks that open `context`, in reading order, each with its file."""
        return [(path, self._files[path][1][number]) for path, number in self._blocks.get(context, ())]

    def opened(self, path: str, section: Section) -> int:
        """Where the block around a section, or the file, begins."""
        return self._files[path][1][section.outer].stop + 1 if section.outer >= 0 else 0

    def includes(self, context: Context, pattern: bytes) -> list[tuple[str, Section]]:
        """The includes of exactly this pattern in `context`, each with its file."""
        return [
            (path, section)
            for path, contexts in self._contexts.items()
            for section in self._files[path][1]
            if section[:2] == (b"include", pattern)
            and any(self._around(path, section, outermost) == context for outermost in contexts)
        ]

    def included(self, pattern: bytes) -> Sequence[str]:
        """The files that an include names, by their names here; relative ones start at the main file's directory."""
        path = posixpath.join(posixpath.dirname(self.main), pattern.decode("utf-8", "surrogateescape"))
        if not is_pattern(path):
            return [self._name(path)]
        if path not in self._globs:
            self._globs[path] = self._reader.look(posixpath.dirname(path)), self._reader.glob(path)
        return [self._name(each) for each in self._globs[path][1]]

    def take(self, path: str, data: bytes, splices: Sequence[Splice]) -> None:
        """The file is `data` now, by these splices (in order) of what it was.

        Splices within upstream blocks, which must not touch includes, cost no scan. ConfSyntaxError when an include
        that is new cannot be read: this index is of no use then.
        """
        real = self._looks[path].real
        self._looks |= {name: look._replace(stamp=None) for name, look in self._looks.items() if look.real == real}
        sections = self._files[path][1]
        upstreams = [each for each in sections if each.kind == b"upstream"]
        starts = [each.stop for each in upstreams]
        holders = [(bisect_left(starts, splice.start) - 1, splice) for splice in splices]
        if all(number >= 0 and splice.end < upstreams[number].end for number, splice in holders):
            self._files[path] = data, _shifted(sections, splices)
            return
        self._files[path] = data, _outline(data, path)
        if [(kind, name, outer) for kind, name, _, _, _, outer in sections] != [
            (kind, name, outer) for kind, name, _, _, _, outer in self._files[path][1]
        ]:
            self._walk()

    def _walk(self) -> None:
        self._contexts: dict[str, set[Context]] = defaultdict(set)
        self._blocks: dict[Context, list[tuple[str, int]]] = defaultdict(list)
        self._globs = {}
        self._names: dict[str, str] = {}
        self._before, self._looks = self._looks, {}
        self._visit(self._name(self.main), (), (), None)
        self._files = {path: self._files[path] for path in self._contexts}
        self._concerned = [path for path in self._looks if self._concerns(path)]

    def _visit(self, path: str, context: Context, within: tuple[str, ...], at: tuple[str, int] | None) -> None:
        if path in within:
            raise ConfSyntaxError(f'"{path}" includes itself', self._place(at))
        within = (*within, path)
        self._contexts[path].add(context)
        self._load(path, at)
        for number, section in enumerate(self._files[path][1]):
            around = self._around(path, section, context)
            if section.kind == b"include":
                for file in self.included(section.name):
                    self._visit(file, around, within, (path, section.start))
            else:
                self._blocks[(*around, section.name or section.kind)].append((path, number))

    def _around(self, path: str, section: Section, outermost: Context) -> Context:
        names: list[bytes] = []
        while section.outer >= 0:
            section = self._files[path][1][section.outer]
            names.append(section.name or section.kind)
        return (*outermost, *reversed(names))

    def _name(self, path: str) -> str:
        """What a file is called here: as it was first reached."""
        if path not in self._looks:
            self._looks[path] = self._before.get(path) or self._reader.look(path)
        return self._names.setdefault(self._looks[path].real, path)

    def _load(self, path: str, at: tuple[str, int] | None) -> None:
        if path in self._files:
            return
        known, look = self._known.get(path), self._looks[path]
        if known and look.stamp is not None and self._known_looks.get(path) == look:
            self._files[path] = known
            return
        try:
            data = self._reader.read(path)
        except OSError as error:
            raise ConfSyntaxError(f'open() "{path}" failed ({error.strerror})', self._place(at)) from error
        self._files[path] = known if known and known[0] == data else (data, _outline(data, path))

    def _place(self, at: tuple[str, int] | None) -> Place | None:
        return Place(at[0], line_of(self.data(at[0]), at[1])) if at else None


def _outline(data: bytes, path: str) -> tuple[Section, ...]:
    sections: list[Section] = []
    outer, skipped = -1, 0
    for kind, raw, start, stop, end in statements(data, path):
        if kind == "}":
            if skipped:
                skipped -= 1
            else:
                sections[outer] = sections[outer]._replace(end=end)
                outer = sections[outer].outer
            continue
        name, argument = b"" if skipped else value(raw), b""
        if (kind, name) in (("{", b"upstream"), (";", b"include")):
            words = words_of(data, start, stop)
            argument = words[1].value if len(words) == 2 else b""
        if not argument and (kind != "{" or name not in (b"http", b"stream") or outer >= 0):
            skipped += kind == "{"
            continue
        sections.append(Section(name, argument, start, stop, end, outer))
        if kind == "{":
            outer = len(sections) - 1
    return tuple(sections)


def _shifted(sections: Sequence[Section], splices: Sequence[Splice]) -> tuple[Section, ...]:
    """The sections where the splices have moved them to."""
    ends = [splice.end for splice in splices]
    moved = [0]
    for start, end, text in splices:
        moved.append(moved[-1] + len(text) - (end - start))
    return tuple(
        Section(
            kind,
            name,
            start + moved[bisect_right(ends, start)],
            stop + moved[bisect_right(ends, stop)],
            end + moved[bisect_left(ends, end)],
            outer,
        )
        for kind, name, start, stop, end, outer in sections
    )
