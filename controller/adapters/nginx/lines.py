"""A routing table against the `server` lines as they stand: what to write, and who gets nothing then.

What a table means for a line is decided in controller/core/quantise.py; whose each parameter is, in
controller/conf/ledger.py. Writing does not stand here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controller.conf.diff import FileEdit
from controller.conf.draft import EditRefused, Reason
from controller.conf.edit import SetParameter, plan
from controller.conf.index import Index
from controller.conf.ledger import Ledger, WrittenLine, written_lines
from controller.conf.parse import digest, split_address
from controller.core.quantise import Key, Line, Setting, Unsayable, quantise

Table = Mapping[str, Any]
"""A routing table as controller/core/table.py makes it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write for a table, none where all stands there; the ledger while it is written, and all lines as read.

    `without` are the servers of the table that no line sends to. `says` has for each upstream of the table a digest of
    what its lines say to nginx once that is written.
    """

    files: tuple[FileEdit, ...]
    ledger: Ledger
    lines: tuple[WrittenLine, ...]
    without: frozenset[Key]
    says: Mapping[str, str]


def planned(index: Index, table: Table, shares: Mapping[Key, float], ledger: Ledger) -> Plan:
    """How the files of `index` come to say what `table` says, with these shares of warming servers.

    An upstream of the table that is gone from the files needs nothing. EditRefused, Unsayable, ConfSyntaxError.
    """
    lines: list[WrittenLine] = []
    edits: list[SetParameter] = []
    without: set[Key] = set()
    says: dict[str, str] = {}
    for name, upstream in table["upstreams"].items():
        keys = [server["key"] for server in upstream["servers"]]
        try:
            method, written = written_lines(index, name)
        except EditRefused as error:
            if error.reason is not Reason.NO_UPSTREAM:
                raise
            method, written = "", ()
        meant = [ledger.meant(line) for line in written]
        own = {key: shares.get((name, key), 1.0) for key in keys}
        settings = quantise(method, upstream, _lines(written, meant, keys), own)
        wanted = [_values(setting, values) for setting, values in zip(settings, meant, strict=True)]
        for line, values in zip(written, wanted, strict=True):
            needed = ledger.edits(line, values)
            if twice := [edit.name for edit in needed if edit.name in line.twice]:
                raise Unsayable(f"{line.place}: {twice[0]} stands twice on this line; leave one")
            edits += needed
        sent = {key for setting in settings if not setting.down for key in setting.keys}
        without |= {(name, key) for key in keys if key not in sent}
        lines += written
        told = [(line.address, line.others, *values.values()) for line, values in zip(written, wanted, strict=True)]
        says[name] = digest(repr((method, told)).encode("utf-8", "backslashreplace"))
    return Plan(plan(index, edits), ledger.before_writing(lines, edits), tuple(lines), frozenset(without), says)


def _lines(
    written: Sequence[WrittenLine], meant: Sequence[Mapping[str, str | None]], keys: Sequence[str]
) -> list[Line]:
    """The lines of an upstream as their author means them, each with the servers of the table that it stands for.

    Lines of one address are one server there, as in files.py: those that are `down`, and a `backup` beside a primary,
    do not count.
    """
    same: dict[tuple[str, int, str], list[int]] = {}
    for at, line in enumerate(written):
        host, port, unix = split_address(line.address, line.place)
        same.setdefault((host.lower(), port, unix), []).append(at)
    lines: dict[int, Line] = {}
    for twins in same.values():
        addresses = {written[at].address for at in twins}
        known = tuple(key for key in keys if any(key == each or key.startswith(f"{each}@") for each in addresses))
        counted = [at for at in twins if meant[at]["down"] is None] or twins
        counted = [at for at in counted if not written[at].backup] or counted
        for at in twins:
            weight, down = int(meant[at]["weight"] or 1), meant[at]["down"] is not None
            lines[at] = Line(str(written[at].place), known, weight, down, written[at].backup, at in counted)
    return [lines[at] for at in range(len(written))]


def _values(setting: Setting, meant: Mapping[str, str | None]) -> dict[str, str | None]:
    return {
        "weight": meant["weight"] if setting.weight is None else str(setting.weight),
        "down": "" if setting.down else None,
        "max_fails": "0" if setting.survivor else meant["max_fails"],
    }
