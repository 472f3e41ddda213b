"""The lines of a configuration that an edit means: each as a draft of its stretch and a number in it.

Says why something cannot be found, or may not be touched. What is done to the lines does not stand here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from controller.conf.draft import Draft, EditRefused, Reason
from controller.conf.index import Index, encoded
from controller.conf.parse import Place
from controller.conf.spans import line_of, skip_gap, statements

Spot = tuple[Draft, int]
HTTP = (b"http",)


class Finder:
    """Drafts of an index's files, made as they are needed; the same stretch is one draft."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.drafts: dict[tuple[str, int, bool], Draft] = {}
        self._servers: dict[str, list[Spot]] = {}
        self._addresses: dict[str, dict[tuple[bytes, ...], list[Spot]]] = {}

    def upstream(self, name: str) -> Draft:
        """The block of an upstream of the http block."""
        context = (*HTTP, encoded(name))
        found = [each for each in self.index.blocks(context) if each[1].kind == b"upstream"]
        if not found:
            message = f'no upstream "{name}" is in the http block of {self.index.main}; name it as it stands there'
            raise EditRefused(Reason.NO_UPSTREAM, message)
        if len(found) > 1:
            place = self._place(found[1][0], found[1][1].start)
            raise EditRefused(Reason.AMBIGUOUS, f'upstream "{name}" stands {len(found)} times; leave one', place)
        path, section = found[0]
        return self._draft(path, section.start, section.end, within=True)

    def lines(self, draft: Draft) -> Iterator[Spot]:
        """The directives of a block in reading order, those of included files in the place of `include`."""
        for number in range(len(draft.directives)):
            yield from self.expanded(draft, number)

    def expanded(self, draft: Draft, number: int) -> Iterator[Spot]:
        """That directive, or in the place of an `include` those of its files."""
        directive = draft.directives[number]
        if directive.name == b"include" and len(directive.args) == 1:
            for path in self.index.included(directive.args[0]):
                yield from self.lines(self._draft(path, 0, len(self.index.data(path)), within=False))
        else:
            yield draft, number

    def servers(self, name: str) -> list[Spot]:
        """The `server` lines of an upstream in reading order; a file included twice counts once."""
        if name not in self._servers:
            lines = dict.fromkeys(self.lines(self.upstream(name)))
            self._servers[name] = [(draft, at) for draft, at in lines if draft.directives[at].name == b"server"]
            by_address = self._addresses[name] = defaultdict(list)
            for draft, at in self._servers[name]:
                by_address[draft.directives[at].args[:1]].append((draft, at))
        return self._servers[name]

    def at_address(self, name: str, address: str) -> list[Spot]:
        """Those of this address, as nginx sees it."""
        self.servers(name)
        return self._addresses[name].get((encoded(address),), [])

    def matching(self, name: str, address: str, occurrence: int | None) -> list[Spot]:
        """Those of this address, or that one of them, from 0, which may be changed; EditRefused where there is none."""
        found = self.at_address(name, address)
        chosen = found if occurrence is None else found[occurrence : occurrence + 1] if occurrence >= 0 else []
        if not chosen:
            which = f" number {occurrence}" if found else ""
            message = f'upstream "{name}" has no server {address}{which}; name it as it stands there'
            raise EditRefused(Reason.NO_SERVER, message, self.upstream(name).begin)
        for draft, _ in chosen:
            self.own(draft)
        return chosen

    def own(self, draft: Draft) -> None:
        """Make sure that a change to this file changes nothing else; EditRefused."""
        contexts = self.index.contexts(draft.path)
        if len(contexts) > 1:
            where = " and ".join(sorted(_named(each) for each in contexts))
            message = f"this file is included in {where}, and an edit would change all of them; edit by hand"
            raise EditRefused(Reason.SHARED, message, draft.begin)

    def http_begin(self) -> Draft:
        """The stretch from the `{` of the http block to the first directive."""
        found = [each for each in self.index.blocks(HTTP) if each[1].kind == b"http"]
        if not found:
            raise EditRefused(Reason.NO_HTTP, f"no http block is in {self.index.main}; write one")
        path, section = found[-1]
        if len(found) > 1:
            message = f"there are {len(found)} http blocks; leave one"
            raise EditRefused(Reason.AMBIGUOUS, message, self._place(path, section.start))
        start = section.stop + 1
        return self._draft(path, start, skip_gap(self.index.data(path), start), within=False)

    def include(self, pattern: str) -> Draft | None:
        """The stretch with the only include of exactly this pattern in the http block."""
        found = self.index.includes(HTTP, encoded(pattern))
        if not found:
            return None
        path, section = found[-1]
        if len(found) > 1:
            message = f"{pattern} is included {len(found)} times; leave one"
            raise EditRefused(Reason.AMBIGUOUS, message, self._place(path, section.start))
        data = self.index.data(path)
        begin = self.index.opened(path, section)
        for statement in statements(data, path, begin, section.start):
            begin = statement.end
        return self._draft(path, begin, skip_gap(data, section.end), within=False)

    def _draft(self, path: str, start: int, end: int, *, within: bool) -> Draft:
        # An upstream may begin where the stretch before the first directive of the http block does.
        if (path, start, within) not in self.drafts:
            self.drafts[path, start, within] = Draft(path, self.index.data(path), start, end, within=within)
        return self.drafts[path, start, within]

    def _place(self, path: str, start: int) -> Place:
        return Place(path, line_of(self.index.data(path), start))


def _named(context: tuple[bytes, ...]) -> str:
    kind, *name = (each.decode("utf-8", "backslashreplace") for each in context or (b"the top level",))
    return f'upstream "{name[0]}" of {kind}' if name else kind
