from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from controller.conf.edit import plan
from controller.conf.index import Index, Look
from controller.conf.ledger import Ledger, restoring, written_lines
from controller.conf.parse import parse

MAIN = "/etc/nginx/nginx.conf"
TEXT = b"""http {
    upstream app {   # a comment
        server 127.0.0.1:1;
        server 127.0.0.1:2 weight=03  max_fails=2;   server "127.0.0.1:3"
            down;
        server 127.0.0.1:2 'weight=5';
        include more.conf;
        least_conn;
    }
}
"""


class Files(dict[str, bytes]):
    """Files by path, as a reader."""

    def read(self, path: str) -> bytes:
        return self[path]

    def look(self, path: str) -> Look:
        return Look(path, None)

    def glob(self, pattern: str) -> Sequence[str]:
        return []


class Desk:
    """A configuration, and the ledger of what was written into it."""

    def __init__(self, text: bytes = TEXT, more: bytes = b"server unix:/run/a.sock;") -> None:
        self.files = Files({MAIN: text, "/etc/nginx/more.conf": more})
        self.before = dict(self.files)
        self.ledger = Ledger()

    @property
    def index(self) -> Index:
        return Index(MAIN, self.files)

    def write(self, *wanted: dict[str, str | None]) -> None:
        """Bring the lines to these values, as the data plane does it; what is not named is as its author meant it."""
        _, lines = written_lines(self.index, "app")
        edits = [
            edit
            for line, values in zip(lines, wanted, strict=True)
            for edit in self.ledger.edits(line, self.ledger.meant(line) | values)
        ]
        known = self.ledger.before_writing(lines, edits)
        for file in plan(self.index, edits):
            assert all(known.meant(line) == self.ledger.meant(line) for line in lines), "known before it is written"
            self.files[file.path] = file.after
        self.ledger = known.settled(written_lines(self.index, "app")[1])

    def meant(self) -> list[dict[str, str | None]]:
        return [self.ledger.meant(line) for line in written_lines(self.index, "app")[1]]


ALL = ({"weight": "10"}, {"down": ""}, {"weight": "1"}, {"max_fails": "0", "weight": "7"}, {"down": "", "weight": "2"})


def test_the_lines_of_an_upstream_are_read_as_they_are_written() -> None:
    method, lines = written_lines(Desk().index, "app")
    assert method == "least_conn"
    assert [(line.address, line.number) for line in lines] == [
        ("127.0.0.1:1", 0),
        ("127.0.0.1:2", 0),
        ("127.0.0.1:3", 0),
        ("127.0.0.1:2", 1),
        ("unix:/run/a.sock", 0),
    ]
    assert lines[1].values == {"weight": "03", "down": None, "max_fails": "2"}
    assert lines[2].values["down"] == ""
    assert str(lines[3].place) == f"{MAIN}:6"


def test_what_was_written_is_known_as_ours_and_goes_back_byte_for_byte() -> None:
    desk = Desk()
    meant = desk.meant()
    desk.write(*ALL)
    assert desk.files != desk.before
    assert desk.meant() == meant
    desk.write({}, {"weight": "12"}, {}, {"down": ""}, {})
    assert desk.meant() == meant
    lines = written_lines(desk.index, "app")[1]
    for file in plan(desk.index, restoring(desk.ledger, lines)):
        desk.files[file.path] = file.after
    assert dict(desk.files) == desk.before
    assert desk.ledger.settled(written_lines(desk.index, "app")[1]).entries == {}


def test_a_value_that_its_author_changes_meanwhile_is_the_authors_again() -> None:
    desk = Desk()
    desk.write(*ALL)
    desk.files[MAIN] = desk.files[MAIN].replace(b"127.0.0.1:1 weight=10", b"127.0.0.1:1 weight=9")
    assert desk.meant()[0]["weight"] == "9"
    assert desk.meant()[1] == {"weight": "03", "down": None, "max_fails": "2"}
    desk.write({"weight": "20"}, {}, {}, {}, {})
    desk.write({}, {}, {}, {}, {})
    assert dict(desk.files) == {**desk.before, MAIN: TEXT.replace(b"127.0.0.1:1;", b"127.0.0.1:1 weight=9;")}


def test_after_a_crash_both_the_old_and_the_new_value_are_known_as_ours() -> None:
    desk = Desk()
    desk.write({"weight": "4"}, {}, {}, {}, {})
    _, lines = written_lines(desk.index, "app")
    edits = desk.ledger.edits(lines[0], desk.ledger.meant(lines[0]) | {"weight": "8", "down": ""})
    known = Ledger.from_json(json.loads(json.dumps(desk.ledger.before_writing(lines, edits).to_json())))
    for text in (desk.files[MAIN], plan(desk.index, edits)[0].after):
        index = Index(MAIN, Files({**desk.files, MAIN: text}))
        assert known.meant(written_lines(index, "app")[1][0]) == {"weight": None, "down": None, "max_fails": None}


def test_a_line_that_is_gone_is_forgotten() -> None:
    desk = Desk()
    desk.write(*ALL)
    desk.files["/etc/nginx/more.conf"] = b""
    settled = desk.ledger.settled(written_lines(desk.index, "app")[1])
    assert {name[1] for name in settled.entries} == {"127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"}


def test_the_model_is_read_without_what_is_ours() -> None:
    desk = Desk()
    before = parse(MAIN, desk.files)
    desk.write(*ALL)
    after = parse(MAIN, desk.files)
    cleaned = desk.ledger.without_ours(after)
    assert [(line.weight, line.down) for line in after.upstreams[0].servers] == [
        (10, False),
        (3, True),
        (1, True),
        (7, False),
        (2, True),
    ]
    for was, now in zip(before.upstreams[0].servers, cleaned.upstreams[0].servers, strict=True):
        assert (was.address, was.weight, was.down) == (now.address, now.weight, now.down)


def test_a_parameter_that_stands_twice_is_told() -> None:
    desk = Desk(TEXT.replace(b"weight=03", b"weight=3 weight=4"))
    line = written_lines(desk.index, "app")[1][1]
    assert (line.twice, line.values["weight"]) == (("weight",), "4")


@pytest.mark.parametrize("rows", [[["app", "a"]], [1], [["app", "a", 0, "weight", None, None]]])
def test_a_damaged_ledger_is_refused(rows: list[object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Ledger.from_json(rows)


def test_what_the_author_wants_meanwhile_comes_when_ours_goes() -> None:
    desk = Desk()
    desk.write(*ALL)
    _, lines = written_lines(desk.index, "app")
    assert [desk.ledger.holds(line, "weight") for line in lines] == [True, False, True, True, True]
    wishes = {
        ("app", "127.0.0.1:1", 0, "weight"): "4",
        ("app", "127.0.0.1:2", 0, "down"): "",
        ("app", "127.0.0.1:2", 1, "weight"): None,
        ("app", "127.0.0.1:1", 0, "down"): "",
    }
    desk.ledger = desk.ledger.meaning(wishes)
    assert [desk.meant()[at]["weight"] for at in (0, 3)] == ["4", None]
    assert desk.meant()[1]["down"] == ""
    assert not desk.ledger.holds(lines[1], "down")
    assert desk.meant()[0]["down"] is None, "what Headgate does not hold is said in the file"
    desk.write({}, {}, {}, {}, {})
    wanted = TEXT.replace(b"127.0.0.1:1;", b"127.0.0.1:1 weight=4;").replace(b" 'weight=5'", b"")
    assert desk.files[MAIN] == wanted.replace(b"max_fails=2;", b"max_fails=2 down;")
