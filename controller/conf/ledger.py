"""What Headgate has written into `server` lines, and what stood there before, to tell its own from the user's.

A parameter that no longer says what Headgate wrote is the user's again. Which settings are wanted, and reading and
writing of files, do not stand here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from controller.conf.edit import SetParameter
from controller.conf.find import Finder
from controller.conf.index import Index
from controller.conf.parse import METHODS, Place, ServerLine, Tree

OURS = ("weight", "down", "max_fails")
"""The parameters that Headgate may write; the value of a flag is the empty text, of a parameter that is absent None."""

Name = tuple[str, str, int, str]
"""(upstream, address as written, its number among equal ones there, parameter)."""


@dataclass(frozen=True, slots=True)
class WrittenLine:
    """A `server` line as it stands. `values` has each of OURS; `twice` names those that stand there more than once.

    `others` are the rest of its parameters, in their order.
    """

    upstream: str
    address: str
    number: int
    place: Place
    values: Mapping[str, str | None]
    backup: bool = False
    twice: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter's value before Headgate's, and the values of Headgate's that may stand there (None: absent)."""

    before: str | None
    ours: tuple[str | None, ...]


def written_lines(index: Index, upstream: str) -> tuple[str, tuple[WrittenLine, ...]]:
    """The balancing method and the `server` lines of an upstream of the http block; EditRefused where there is none."""
    finder = Finder(index)
    names = [_text(draft.directives[at].name) for draft, at in finder.lines(finder.upstream(upstream))]
    numbers: Counter[str] = Counter()
    lines = []
    for draft, at in finder.servers(upstream):
        address, *parameters = map(_text, draft.directives[at].args)
        values: dict[str, str | None] = dict.fromkeys(OURS)
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name in OURS:
                values[name] = value
        twice = tuple(each for each in OURS if sum(p.partition("=")[0] == each for p in parameters) > 1)
        others = tuple(each for each in parameters if each.partition("=")[0] not in OURS)
        number, backup = numbers[address], "backup" in others
        lines.append(WrittenLine(upstream, address, number, draft.place(at), values, backup, twice, others))
        numbers[address] += 1
    return next((name for name in names if name in METHODS), "round_robin"), tuple(lines)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Entries by name. A value that is the user's has none."""

    entries: Mapping[Name, Entry] = field(default_factory=dict)

    def meant(self, line: WrittenLine) -> dict[str, str | None]:
        """What the user wants of a line: what stands there, without what Headgate wrote."""
        return {name: self._before(_name(line, name), value) for name, value in line.values.items()}

    def edits(self, line: WrittenLine, wanted: Mapping[str, str | None]) -> list[SetParameter]:
        """What must change for the line to say `wanted`."""
        return [
            SetParameter(line.upstream, line.address, name, wanted[name], line.number)
            for name, value in line.values.items()
            if value != wanted[name]
        ]

    def before_writing(self, lines: Iterable[WrittenLine], edits: Iterable[SetParameter]) -> Ledger:
        """The ledger to keep while these edits are made: whatever then stands there, it is known whose it is."""
        values = {_name(line, name): value for line in lines for name, value in line.values.items()}
        entries = dict(self.entries)
        for edit in edits:
            name = (edit.upstream, edit.address, edit.occurrence or 0, edit.name)
            before, ours = self._before(name, values[name]), tuple({values[name], edit.value})
            entries[name] = Entry(before, tuple(each for each in ours if each != before))
        return Ledger(entries)

    def settled(self, lines: Iterable[WrittenLine]) -> Ledger:
        """The ledger when no edit is under way: of these lines, which are all there are, what stands there."""
        return Ledger(
            {
                key: Entry(entry.before, (value,))
                for line in lines
                for name, value in line.values.items()
                if (entry := self.entries.get(key := _name(line, name))) and value in entry.ours
            }
        )

    def holds(self, line: WrittenLine, parameter: str) -> bool:
        """Whether what stands there of a parameter is Headgate's."""
        entry = self.entries.get(_name(line, parameter))
        return entry is not None and line.values[parameter] in entry.ours

    def meaning(self, meant: Mapping[Name, str | None]) -> Ledger:
        """The ledger when the author wants these values where Headgate's stand; a parameter without entry has none."""
        entries = dict(self.entries)
        for name, value in meant.items():
            if entry := entries.get(name):
                entries[name] = Entry(value, tuple(each for each in entry.ours if each != value))
        return Ledger({name: entry for name, entry in entries.items() if entry.ours})

    def without_ours(self, tree: Tree) -> Tree:
        """What was parsed, as its author means it: without the weights and `down` marks that are Headgate's."""
        return replace(
            tree,
            upstreams=tuple(
                replace(block, servers=tuple(self._cleaned(block.name, block.servers))) for block in tree.upstreams
            ),
        )

    def to_json(self) -> list[object]:
        """Plain lists, for a file."""
        return [[*name, entry.before, list(entry.ours)] for name, entry in self.entries.items()]

    @staticmethod
    def from_json(rows: Sequence[Any]) -> Ledger:
        """What `to_json` gave; ValueError, TypeError."""
        return Ledger(
            {
                (upstream, address, number, name): Entry(before, tuple(ours))
                for upstream, address, number, name, before, ours in rows
            }
        )

    def _before(self, name: Name, value: str | None) -> str | None:
        entry = self.entries.get(name)
        return entry.before if entry and value in entry.ours else value

    def _cleaned(self, upstream: str, servers: Sequence[ServerLine]) -> Iterator[ServerLine]:
        numbers: Counter[str] = Counter()
        for line in servers:
            number = numbers[line.address]
            numbers[line.address] += 1
            weight = self.entries.get((upstream, line.address, number, "weight"))
            if weight and str(line.weight) in weight.ours:
                line = replace(line, weight=int(weight.before or 1))
            down = self.entries.get((upstream, line.address, number, "down"))
            if down and line.down and "" in down.ours:
                line = replace(line, down=False)
            yield line


def restoring(ledger: Ledger, lines: Iterable[WrittenLine]) -> list[SetParameter]:
    """The edits that give every line back to its author, byte for byte."""
    return [edit for line in lines for edit in ledger.edits(line, ledger.meant(line))]


def _name(line: WrittenLine, parameter: str) -> Name:
    return (line.upstream, line.address, line.number, parameter)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
