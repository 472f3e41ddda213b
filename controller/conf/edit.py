"""Edits of a user's nginx configuration as data, and their plan: bytes before and after, proved before anybody writes.

An edit says what is to be so. `plan` changes nothing else, and either proves all edits or refuses all of them. How
lines are found and how bytes are changed does not stand here, nor does writing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from controller.conf.diff import FileEdit
from controller.conf.draft import Draft, EditRefused, Reason
from controller.conf.find import Finder, Spot
from controller.conf.index import Index, Splice, encoded
from controller.conf.parse import METHODS, ConfSyntaxError, Place, duration_seconds, split_address
from controller.conf.spans import LONGEST


@dataclass(frozen=True, slots=True)
class AddServer:
    """A new `server` line behind the last one of the upstream; parameters by name, a flag has an empty value."""

    upstream: str
    address: str
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RemoveServer:
    """The `server` lines of this address, as it is written there, go: all, or the one of that number, from 0."""

    upstream: str
    address: str
    occurrence: int | None = None


@dataclass(frozen=True, slots=True)
class SetParameter:
    """A parameter of the `server` lines of this address: all, or the one of that number, from 0.

    `name` is weight, max_conns, max_fails, fail_timeout, down or backup. The value of a flag (down, backup) is empty;
    None drops the parameter.
    """

    upstream: str
    address: str
    name: str
    value: str | None
    occurrence: int | None = None


@dataclass(frozen=True, slots=True)
class AddInclude:
    """`include PATH;` as the first line of the http block."""

    path: str


@dataclass(frozen=True, slots=True)
class RemoveInclude:
    """The include of exactly this path in the http block goes."""

    path: str


@dataclass(frozen=True, slots=True)
class AddHook:
    """The balancer hook, behind the servers of the upstream and its method, and before its keepalive."""

    upstream: str


@dataclass(frozen=True, slots=True)
class RemoveHook:
    """The balancer hook that AddHook put there goes."""

    upstream: str


Edit = AddServer | RemoveServer | SetParameter | AddInclude | RemoveInclude | AddHook | RemoveHook

_METHODS = frozenset(method.encode() for method in METHODS)
_NUMBERS = frozenset({"weight", "max_conns", "max_fails"})
_FLAGS = frozenset({"down", "backup"})
_IN_LUA = r"[^\x00-\x1f\x7f\"\\]+"


def plan(index: Index, edits: Sequence[Edit]) -> tuple[FileEdit, ...]:
    """All edits together, each file once, unchanged files left out; EditRefused when one of them cannot be made.

    Every edit means the files as they are in the index: none sees what another one adds. Reads no file.
    """
    planning = _Planning(index)
    # What is added stands beside lines that stay, and the hook behind added servers.
    first, last = RemoveServer | RemoveInclude, AddHook
    for edit in sorted(edits, key=lambda each: (isinstance(each, last), not isinstance(each, first))):
        planning.make(edit)
    return planning.result()


class _Planning:
    def __init__(self, index: Index) -> None:
        self._finder = Finder(index)
        self._added: dict[str, set[str]] = defaultdict(set)
        self._removed_from: set[str] = set()
        self._set: set[tuple[int, int, str]] = set()
        self._ours: set[Edit] = set()

    def make(self, edit: Edit) -> None:
        if isinstance(edit, AddInclude | RemoveInclude | AddHook | RemoveHook):
            if edit in self._ours:
                raise EditRefused(Reason.CONFLICT, f"{edit} is asked twice for {self._finder.index.main}; ask once")
            self._ours.add(edit)
        match edit:
            case AddServer():
                self._add_server(edit)
            case RemoveServer():
                self._remove_server(edit)
            case SetParameter():
                self._set_parameter(edit)
            case AddInclude(path):
                self._add_include(path)
            case RemoveInclude(path):
                self._remove_include(path)
            case AddHook(upstream):
                self._add_hook(upstream)
            case RemoveHook(upstream):
                self._remove_hook(upstream)

    def result(self) -> tuple[FileEdit, ...]:
        for name in self._removed_from - self._added.keys():
            if all(number in draft.removed for draft, number in self._finder.servers(name)):
                message = f'upstream "{name}" would have no server, which nginx refuses; leave one, or mark it down'
                raise EditRefused(Reason.LAST_SERVER, message, self._finder.upstream(name).begin)
        drafts = defaultdict(list)
        for draft in sorted(self._finder.drafts.values(), key=lambda each: (each.start, each.end)):
            if splices := draft.splices():
                drafts[draft.path].append((draft, splices))
        return tuple(_file_edit(many) for many in drafts.values())

    def _add_server(self, edit: AddServer) -> None:
        name, address = edit.upstream, edit.address
        block, servers = self._finder.upstream(name), self._finder.servers(name)
        try:
            split_address(address, block.begin)
        except ConfSyntaxError as error:
            raise EditRefused(Reason.BAD_VALUE, str(error)) from error
        words: tuple[bytes, ...] = (b"server", _checked(address, block.begin))
        for key, text in edit.parameters.items():
            words += (_checked_parameter(key, text, block.begin),)
        same = [draft.place(at) for draft, at in self._finder.at_address(name, address) if at not in draft.removed]
        if same or address in self._added[name]:
            raise EditRefused(Reason.EXISTS, f'{address} is a server of upstream "{name}" already', *same[:1])
        # Behind the last line that stays; one in the block itself rather than one in a file that it includes.
        spots = [(at not in draft.removed, draft is block, number) for number, (draft, at) in enumerate(servers)]
        draft, after = servers[max(spots)[2]] if spots else (block, -1)
        self._finder.own(draft)
        draft.insert(words, after)
        self._added[name].add(address)

    def _remove_server(self, edit: RemoveServer) -> None:
        for draft, number in self._finder.matching(edit.upstream, edit.address, edit.occurrence):
            if number in draft.removed:
                raise EditRefused(Reason.CONFLICT, f"{edit.address} is removed twice", draft.place(number))
            draft.remove(number)
        self._removed_from.add(edit.upstream)

    def _set_parameter(self, edit: SetParameter) -> None:
        for draft, number in self._finder.matching(edit.upstream, edit.address, edit.occurrence):
            _checked_parameter(edit.name, edit.value, draft.place(number))
            if (id(draft), number, edit.name) in self._set or number in draft.removed:
                message = f"{edit.address} is asked two things at once; ask one"
                raise EditRefused(Reason.CONFLICT, message, draft.place(number))
            self._set.add((id(draft), number, edit.name))
            draft.set_parameter(number, edit.name, edit.value)

    def _add_include(self, path: str) -> None:
        if there := self._finder.include(path):
            raise EditRefused(Reason.EXISTS, f"{path} is included already", there.begin)
        begin = self._finder.http_begin()
        self._finder.own(begin)
        begin.insert((b"include", _checked(path, begin.begin)), -1)

    def _remove_include(self, path: str) -> None:
        draft = self._finder.include(path)
        if draft is None:
            message = f"{path} is not included in the http block of {self._finder.index.main}"
            raise EditRefused(Reason.NOT_THERE, message)
        self._finder.own(draft)
        draft.remove(0)

    def _add_hook(self, name: str) -> None:
        block = self._finder.upstream(name)
        if found := self._hook(name):
            raise EditRefused(Reason.EXISTS, f'upstream "{name}" has its hook already', found[0].place(found[1]))
        names = [
            {draft.directives[at].name for draft, at in self._finder.expanded(block, number)}
            for number in range(len(block.directives))
        ]
        limit = next((number for number, each in enumerate(names) if b"keepalive" in each), len(names))
        late = next((number for number in range(limit, len(names)) if names[number] & _METHODS), None)
        if late is not None:
            message = "the balancing method stands behind keepalive and would switch the hook off; move it above"
            raise EditRefused(Reason.ORDER, message, block.place(late))
        before = [number for number in range(limit) if names[number] & (_METHODS | {b"server"})]
        self._finder.own(block)
        block.insert((b"balancer_by_lua_block", _hook_body(name, block.begin)), max(before, default=-1), lua=True)

    def _remove_hook(self, name: str) -> None:
        found = self._hook(name)
        if found is None:
            place = self._finder.upstream(name).begin
            raise EditRefused(Reason.NOT_THERE, f'upstream "{name}" has no hook', place)
        draft, number = found
        self._finder.own(draft)
        draft.remove(number)

    def _hook(self, name: str) -> Spot | None:
        """Our hook; EditRefused when there is another one."""
        block = self._finder.upstream(name)
        for draft, number in self._finder.lines(block):
            hook = draft.directives[number]
            if hook.name.startswith(b"balancer_by_lua"):
                if hook.lua is None or hook.lua.strip() != _hook_body(name, block.begin).strip():
                    message = f'upstream "{name}" has a balancer hook that Headgate did not write; take it out by hand'
                    raise EditRefused(Reason.FOREIGN_HOOK, message, draft.place(number))
                return draft, number
        return None


def _file_edit(drafts: Sequence[tuple[Draft, Sequence[Splice]]]) -> FileEdit:
    """The drafts of one file, in order, put together and proved."""
    path, before = drafts[0][0].path, drafts[0][0].data
    pieces: list[bytes] = []
    proofs, done, moved = [], 0, 0
    for draft, splices in drafts:
        if draft.start < done:
            raise EditRefused(Reason.CONFLICT, "two edits touch the same lines; make one after the other", draft.begin)
        grown = sum(len(text) - (end - start) for start, end, text in splices)
        proofs.append((draft, draft.start + moved, draft.end + moved + grown))
        moved += grown
        for start, end, text in splices:
            pieces += before[done:start], text
            done = end
        pieces.append(before[done : draft.end])
        done = draft.end
    after = b"".join([*pieces, before[done:]])
    for draft, start, end in proofs:
        draft.prove(after, start, end)
    return FileEdit(path, before, after, tuple(splice for _, splices in drafts for splice in splices))


def _hook_body(name: str, place: Place) -> bytes:
    return b' require("headgate").balance("' + _checked(name, place, _IN_LUA) + b'") '


def _checked(text: str, place: Place, pattern: str = r"[^\x00-\x1f\x7f]+") -> bytes:
    if not re.fullmatch(pattern, text) or len(encoded(text)) > LONGEST:
        raise EditRefused(Reason.BAD_VALUE, f"{text!r} cannot be written here", place)
    return encoded(text)


def _checked_parameter(name: str, value: str | None, place: Place) -> bytes:
    """A parameter as it is written; EditRefused when nginx would not take it. None stands for any value."""
    if name in _FLAGS:
        good = value in ("", None)
    elif name in _NUMBERS:
        good = value is None or (re.fullmatch("[0-9]{1,9}", value) is not None and int(value) >= (name == "weight"))
    else:
        good = name == "fail_timeout" and (value is None or (" " not in value and duration_seconds(value) is not None))
    if not good:
        names = ", ".join(sorted(_NUMBERS | _FLAGS | {"fail_timeout"}))
        shown = name if value is None else f"{name}={value}"
        raise EditRefused(Reason.BAD_VALUE, f'nginx takes no parameter "{shown}"; there are {names}', place)
    return f"{name}={value}".encode() if value else name.encode()
