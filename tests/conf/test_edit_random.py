"""Random edits of random and of other people's configurations: exactly as meant, or refused; never a byte damaged.

What was meant is computed here from crossplane's reading alone, without spans.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from controller.conf.draft import EditRefused, Reason
from controller.conf.edit import (
    AddHook,
    AddInclude,
    AddServer,
    Edit,
    RemoveHook,
    RemoveInclude,
    RemoveServer,
    SetParameter,
    plan,
)
from controller.conf.index import Index
from controller.conf.parse import ConfSyntaxError, RawDirective, raw_directives
from tests.support.confs import CORPUS, Files, addresses, configurations, corpus_files, needs_corpus

MAIN, OURS = "/n/nginx.conf", "/n/ours.conf"
NAMES = st.sampled_from([*["app"] * 5, *["b"] * 3, "c"])
VALUES = {
    "weight": ["1", "30", None, "0"],
    "max_conns": ["0", "9", None],
    "max_fails": ["3", None],
    "fail_timeout": ["10s", "1m", None, ""],
    "down": ["", None],
    "backup": ["", None, "x"],
}


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    name, address = draw(NAMES), draw(addresses)
    parameter = draw(st.sampled_from(sorted(VALUES)))
    value = draw(st.sampled_from(VALUES[parameter]))
    which = draw(st.sampled_from([None, None, 0, 1]))
    return draw(
        st.sampled_from(
            [
                SetParameter(name, address, parameter, value, which),
                SetParameter(name, address, parameter, value),
                SetParameter(name, address, "weight", "12"),
                AddServer(name, draw(st.sampled_from(["new:1", "new:2", address])), {parameter: value or ""}),
                AddServer(name, draw(st.sampled_from(["new:1", "unix:/n w"])), {"max_fails": "0"}),
                RemoveServer(name, address, which),
                AddHook(name),
                RemoveHook(name),
                AddInclude(OURS),
                RemoveInclude(OURS),
            ]
        )
    )


Entry = tuple[tuple[str, ...], str, tuple[str, ...]]


def flat(tree: list[RawDirective], within: tuple[str, ...] = ()) -> Iterator[Entry]:
    """Every directive with what encloses it."""
    for each in tree:
        yield within, each.name, tuple(each.args)
        yield from flat(each.block or [], (*within, " ".join([each.name, *each.args])))


def reading(files: dict[str, bytes]) -> dict[str, list[Entry]]:
    return {path: list(flat(raw_directives(path, data))) for path, data in files.items()}


def server_lines(where: Files, read: dict[str, list[Entry]], name: str) -> list[tuple[str, int]]:
    """The `server` lines of an upstream, files that it includes among them, each once."""
    found = []
    for number, (within, directive, args) in enumerate(read[MAIN]):
        if within == ("http", f"upstream {name}"):
            found += [(MAIN, number)] * (directive == "server")
            for path in where.glob(f"/n/{args[0]}") if directive == "include" else ():
                found += [(path, at) for at, each in enumerate(read[path]) if each[:2] == ((), "server")]
    return list(dict.fromkeys(found))


def changed(args: tuple[str, ...], key: str, value: str | None) -> tuple[str, ...]:
    old = [arg for arg in args[1:] if arg == key or arg.startswith(f"{key}=")]
    new = f"{key}={value}" if value else key
    if value is None:
        return tuple(arg for arg in args if arg not in old)
    return tuple(new if arg in old else arg for arg in args) if old else (*args, new)


def check(where: Files, wanted: list[Edit], after: dict[str, bytes]) -> None:
    """Compare crossplane's reading of the files afterwards with the one that the edits ask for."""
    before, now = reading(where.files), reading(after)
    kept: dict[str, list[Entry | None]] = {path: [*entries] for path, entries in before.items()}
    added: dict[str, list[Entry]] = {path: [] for path in before}
    for edit in sorted(wanted, key=lambda each: not isinstance(each, RemoveServer)):
        block = ("http", f"upstream {getattr(edit, 'upstream', '')}")
        hook: Entry = (block, "balancer_by_lua_block", (f' require("headgate").balance("{block[1][9:]}") ',))
        match edit:
            case SetParameter(name, address, _, _, which) | RemoveServer(name, address, which):
                spots = [
                    spot for spot in server_lines(where, before, name) if before[spot[0]][spot[1]][2][0] == address
                ]
                for path, at in spots if which is None else [spots[which]]:
                    entry = kept[path][at]
                    assert entry is not None
                    new = entry[2] if isinstance(edit, RemoveServer) else changed(entry[2], edit.name, edit.value)
                    kept[path][at] = None if isinstance(edit, RemoveServer) else (*entry[:2], new)
            case AddServer(name, address, parameters):
                words = (address, *(f"{key}={value}" if value else key for key, value in parameters.items()))
                spots = server_lines(where, before, name)
                spots = [(path, at) for path, at in spots if kept[path][at] is not None] or spots
                path = MAIN if MAIN in dict(spots) or not spots else spots[-1][0]
                added[path].append((block if path == MAIN else (), "server", words))
            case AddInclude(path):
                added[MAIN].append((("http",), "include", (path,)))
            case RemoveInclude(path):
                kept[MAIN][before[MAIN].index((("http",), "include", (path,)))] = None
            case AddHook():
                added[MAIN].append(hook)
            case RemoveHook():
                kept[MAIN][before[MAIN].index(hook)] = None
    for path, entries in now.items():
        stay = [each for each in kept[path] if each is not None]
        assert Counter(entries) == Counter(stay + added[path])
        order = iter(entries)
        assert all(each in order for each in stay), "the order changed"


def attempt(where: Files, wanted: list[Edit]) -> str:
    """Make the edits; the reason of the refusal, or "made"."""
    index = Index(MAIN, where)
    try:
        made = plan(index, wanted)
    except EditRefused as refused:
        if refused.reason == Reason.UNPROVEN:
            raise
        return refused.reason
    after = dict(where.files)
    for each in made:
        rebuilt, done = b"", 0
        for start, end, text in each.splices:
            assert done <= start <= end
            rebuilt, done = rebuilt + each.before[done:start] + text, end
        assert each.after == rebuilt + each.before[done:]
        assert each.before == after[each.path] != each.after
        after[each.path] = each.after
        index.take(each.path, each.after, each.splices)
    check(where, wanted, after)
    fresh = Index(MAIN, Files(after))
    assert (index._files, index._blocks, index._contexts) == (fresh._files, fresh._blocks, fresh._contexts)
    back: list[Edit] = []
    for edit in wanted:
        match edit:
            case AddServer(name, address):
                back.append(RemoveServer(name, address))
            case AddInclude(path):
                back.append(RemoveInclude(path))
            case AddHook(name):
                back.append(RemoveHook(name))
    if len(back) == len(wanted):
        undone = {each.path: each.after for each in plan(index, back)}
        assert {**after, **undone} == where.files
    return "made"


@st.composite
def foreign(draw: st.DrawFn) -> Files:
    """A main file of the corpus, with random upstreams put at the beginning of its http block."""
    theirs = draw(st.sampled_from([data for path in corpus_files() if b"http" in (data := path.read_bytes())]))
    where = draw(configurations())
    ours = re.sub(rb"(?s).*?(upstream.*)\}.*", rb"\1", where.files[MAIN])
    return Missing({**where.files, MAIN: re.sub(rb"(http\s*\{)", lambda found: found[1] + ours, theirs, count=1)})


class Missing(Files):
    """Files that are not there are empty: the corpus names certificates and types that it does not hold."""

    def read(self, path: str) -> bytes:
        return self.files.setdefault(path, b"")


def run(where: Files, wanted: list[Edit]) -> str:
    """The reason of the refusal, "made", or "broken" where nginx could not read the files either."""
    where.files[OURS] = b""
    note(f"{where} {wanted}")
    try:
        return attempt(where, wanted)
    except ConfSyntaxError as error:
        if error.place is None:
            raise
        return "broken"


several_edits = st.lists(edits(), min_size=1, max_size=4)


@given(configurations(), several_edits)
@settings(max_examples=350, deadline=None)
def test_random_edits_are_made_as_meant_or_refused(where: Files, wanted: list[Edit]) -> None:
    run(where, wanted)


@needs_corpus
@given(foreign(), several_edits)
@settings(max_examples=150, deadline=None)
def test_random_edits_of_the_corpus_are_made_as_meant_or_refused(where: Files, wanted: list[Edit]) -> None:
    run(where, wanted)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_random_edits_damage_no_byte(capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()
    sources = configurations() | foreign() if CORPUS else configurations()

    @given(sources, several_edits)
    @settings(max_examples=16_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def many(where: Files, wanted: list[Edit]) -> None:
        counts[run(where, wanted)] += 1

    many()
    with capsys.disabled():
        print("\n" + "\n".join(f"{count:7} {outcome}" for outcome, count in counts.most_common()))
    # hypothesis counts an example that it has tried before, too, but does not try it again.
    assert counts.total() > 10_000
    assert counts["made"] > counts.total() / 20
    assert counts.keys() >= {Reason.SHARED, Reason.EXISTS, Reason.FOREIGN_HOOK, Reason.ORDER, Reason.NO_SERVER}
