"""controller.conf.edit on odd forms: exactly the bytes that were meant, and given back byte for byte."""

from __future__ import annotations

import posixpath
import re
import subprocess
from pathlib import Path

import pytest

from controller.conf import draft as drafts
from controller.conf.diff import FileEdit, diff
from controller.conf.draft import Draft, EditRefused, Reason
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
from controller.conf.index import Index, Look
from controller.conf.parse import ConfSyntaxError
from tests.support.confs import Files, corpus_files, needs_corpus

MAIN = "/n/nginx.conf"
HOOK = b'balancer_by_lua_block { require("headgate").balance("app") }'
DOCS = Path(__file__).parents[2] / "docs" / "editing.md"


def files(text: bytes | str, **others: bytes) -> Files:
    named = {f"/n/{name}.conf": data for name, data in others.items()}
    return Files({MAIN: text.encode() if isinstance(text, str) else text, **named})


def linked(text: str) -> Files:
    """With /n/l/s.conf, a symbolic link to /n/s.conf."""
    return Files({MAIN: text.encode(), "/n/s.conf": b"server b;"}, {"/n/l/s.conf": "/n/s.conf"})


def apply(where: Files, *edits: Edit) -> Files:
    """The files after the edits; an index that followed them equals one that is read anew."""
    index = Index(MAIN, where)
    after = dict(where.files)
    for each in plan(index, edits):
        assert each.before == after[each.path]
        after[each.path] = each.after
    for each in plan(index, edits):
        index = follow(index, Files({**after, "/n/h.conf": b""}), each)
    return Files(after)


def follow(index: Index, where: Files, edit: FileEdit) -> Index:
    index._reader = where
    index.take(edit.path, edit.after, edit.splices)
    fresh = Index(MAIN, where)
    if set(fresh._files) == set(index._files) and all(index.data(path) == fresh.data(path) for path in fresh._files):
        assert (index._files, index._blocks) == (fresh._files, fresh._blocks)
    return index


def block(body: str) -> str:
    return f"http {{ upstream app {{ {body} }} }}"


def edited(body: str, *edits: Edit) -> str:
    text = apply(files(block(body)), *edits).files[MAIN].decode()
    return text.removeprefix("http { upstream app {").removesuffix(" } }")


def refusal(where: Files, *edits: Edit) -> EditRefused:
    with pytest.raises(EditRefused) as caught:
        plan(Index(MAIN, where), edits)
    return caught.value


def weight(value: str | None, address: str = "a", occurrence: int | None = None) -> SetParameter:
    return SetParameter("app", address, "weight", value, occurrence)


@pytest.mark.parametrize(
    ("before", "edit", "after"),
    [
        ("server a;", weight("5"), "server a weight=5;"),
        ("server a weight=1;", weight("5"), "server a weight=5;"),
        ("server a  weight=1\tdown;", weight("20"), "server a  weight=20\tdown;"),
        ('server a "weight=1";', weight("5"), 'server a "weight=5";'),
        ("server a 'weight=1' ;", weight("5"), "server a 'weight=5' ;"),
        ("server a weight=1 down;", weight(None), "server a down;"),
        ("server a\n  weight=1\n  down ;", weight(None), "server a\n  down ;"),
        ("server a # one\n  weight=1 # two\n  ;", weight("5"), "server a # one\n  weight=5 # two\n  ;"),
        ("server a # one\n  weight=1;", weight(None), "server a # one\n;"),
        ("server a # one\n  ;", weight("5"), "server a weight=5 # one\n  ;"),
        ("server a;", weight(None), "server a;"),
        ("server a weight=5;", weight("5"), "server a weight=5;"),
        ("server a weight=1 weight=2;", weight("5"), "server a weight=5 weight=5;"),
        ("server a; server b;", weight("5", "b"), "server a; server b weight=5;"),
        ("server a;server a;", weight("5"), "server a weight=5;server a weight=5;"),
        ("server a; server a;", weight("5", occurrence=1), "server a; server a weight=5;"),
        ("server 'a' down;", weight("5"), "server 'a' down weight=5;"),
        ('"server" "a";', weight("5"), '"server" "a" weight=5;'),
        ("server [::1]:80;", weight("5", "[::1]:80"), "server [::1]:80 weight=5;"),
        ('server "unix:/run/a b";', weight("5", "unix:/run/a b"), 'server "unix:/run/a b" weight=5;'),
        ("server $x;", weight("5", "$x"), "server $x weight=5;"),
        ("server ${x}y;", weight("5", "${x}y"), "server ${x}y weight=5;"),
        ("server a; keepalive 2;", SetParameter("app", "a", "down", ""), "server a down; keepalive 2;"),
        ("server a down;", SetParameter("app", "a", "down", ""), "server a down;"),
        ("server a down backup;", SetParameter("app", "a", "down", None), "server a backup;"),
        ("server a max_conns=1;", SetParameter("app", "a", "max_conns", "0"), "server a max_conns=0;"),
        ("server a;", SetParameter("app", "a", "fail_timeout", "1m30s"), "server a fail_timeout=1m30s;"),
        ("server a;", AddServer("app", "b:1"), "server a; server b:1;"),
        ("server a; # c\n", AddServer("app", "b:1"), "server a; server b:1; # c\n"),
        (
            "\n\tserver a;  # c\n",
            AddServer("app", "b", {"weight": "2", "down": ""}),
            "\n\tserver a;  # c\n\tserver b weight=2 down;\n",
        ),
        (
            "\n server a\n  down;\n keepalive 3;\n",
            AddServer("app", "b"),
            "\n server a\n  down;\n server b;\n keepalive 3;\n",
        ),
        ("\n  server a; server c;\r\n", AddServer("app", "b"), "\n  server a; server c;\r\n  server b;\r\n"),
        ("server a;", AddServer("app", "unix:/a b"), 'server a; server "unix:/a b";'),
        ("server a;server b;", RemoveServer("app", "a"), "server b;"),
        ("server a; server b;", RemoveServer("app", "b"), "server a;"),
        ("server b; server a; server a;", RemoveServer("app", "a"), "server b;"),
        ("server a; server b; server a;", RemoveServer("app", "a", 1), "server a; server b;"),
        ("\n server a;\n server b;\n", RemoveServer("app", "b"), "\n server a;\n"),
        ("\r\n server a;\r\n\tserver b\n  down;  \r\n#x\r\n", RemoveServer("app", "b"), "\r\n server a;\r\n#x\r\n"),
        ("\n server a;\n server b; # b's\n", RemoveServer("app", "b"), "\n server a;\n # b's\n"),
        ("\n server a; # a's\n server b;\n", RemoveServer("app", "b"), "\n server a; # a's\n"),
        ("\n server a; # a's\n server b;\r\n", RemoveServer("app", "b"), "\n server a; # a's\n"),
    ],
)
def test_an_edit_touches_the_bytes_that_it_means(before: str, edit: Edit, after: str) -> None:
    # A server line that goes from the front of a one-line block takes the blank before it along.
    assert edited(before, edit).removeprefix(" ") == after


def test_several_edits_of_a_file_are_made_together() -> None:
    before = "\n server a weight=1;\n server b down; server c;\n"
    edits = [
        AddHook("app"),
        weight("9"),
        SetParameter("app", "b", "down", None),
        AddServer("app", "d"),
        RemoveServer("app", "c"),
        SetParameter("app", "a", "backup", ""),
        AddServer("app", "e"),
    ]
    after = f"\n server a weight=9 backup;\n server b; server d; server e;\n {HOOK.decode()}\n"
    assert edited(before, *edits).removeprefix(" ") == after
    assert edited(
        before, RemoveServer("app", "a"), RemoveServer("app", "b"), RemoveServer("app", "c"), AddServer("app", "z")
    ).strip() == ("server z;")


FORMS = {
    "many lines": b"http {\n    # ours\n    upstream app {\n        server a;  # one\n        keepalive 4;\n    }\n}\n",
    "no final newline": b"http {\n  upstream app {\n    server a;\n  }\n}",
    "one line": b"http { upstream app { server a; keepalive 2; } }",
    "no blanks": b"http{upstream app{server a;keepalive 2;}}",
    "CRLF": b"http {\r\n\tupstream app {\r\n\t\tserver a;\r\n\t\tserver b; # c\r\n\t}\r\n}\r\n",
    "tabs": b"http\n{\n\tupstream app\n\t{\n\t\tserver a;\t\n\t}\n}\n",
    "odd indentation": b"  http {\n     # c\n\nupstream app {\n  server a;\n      server b\n down\n;\n keepalive 1;}}",
    "keepalive first": b"http {\n  upstream app {\n    keepalive 4;\n    server a;\n  }\n}\n",
    "method": b"http {\n  upstream app {\n    server a;\n    least_conn; # fast\n    keepalive 4;\n  }\n}\n",
    "not UTF-8": b"http { # \xff\n  upstream app {\n    server a; # \xe9\n server b; }\n}\n",
    "comment at the end": b"http {\n upstream app {\n server a;\n #}\n }\n}\n# end",
    "empty http line": b"http {\n\n    include parts.conf; upstream app { server a; }\n}\n",
    "Lua before": b'http {\n init_by_lua_block { a = "}" --[[ } ]] }\n upstream app {\n server a; }\n}\n',
    "carriage return": b"http {\n upstream app {\n server a; # x\r}\n\n}\n}\n\r",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_release_gives_an_adopted_file_back_byte_for_byte(form: bytes) -> None:
    where = files(form, parts=b"")
    where.files["/usr/share/h.conf"] = b""
    adopted = apply(where, AddInclude("/usr/share/h.conf"), AddHook("app"))
    text = adopted.files[MAIN]
    assert HOOK in text
    assert b"include /usr/share/h.conf;" in text
    assert (text.find(HOOK) < text.find(b"keepalive")) or b"keepalive" not in text
    assert apply(adopted, RemoveInclude("/usr/share/h.conf"), RemoveHook("app")).files == where.files


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_what_was_added_and_set_goes_again_byte_for_byte(form: bytes) -> None:
    where = files(form, parts=b"")
    for there, back in [
        (AddServer("app", "new:1", {"weight": "3"}), RemoveServer("app", "new:1")),
        (SetParameter("app", "a", "max_fails", "0"), SetParameter("app", "a", "max_fails", None)),
        (SetParameter("app", "a", "backup", ""), SetParameter("app", "a", "backup", None)),
    ]:
        changed = apply(where, there)
        assert changed.files != where.files
        assert apply(changed, back).files == where.files


@needs_corpus
@pytest.mark.parametrize("path", corpus_files(), ids=str)
def test_our_include_goes_in_and_out_of_every_file_of_the_corpus(path: Path) -> None:
    where = Files({MAIN: path.read_bytes(), "/h.conf": b""})
    where.glob = lambda pattern: []  # type: ignore[method-assign]
    read = where.read
    where.read = lambda name: read(name) if name in where.files else b""  # type: ignore[method-assign]
    try:
        index = Index(MAIN, where)
    except ConfSyntaxError as error:
        pytest.skip(f"it is broken: {error}")
    if not re.search(rb"""^\s*["']?http["']?\s*(#.*)?\s*{""", where.files[MAIN], re.MULTILINE):
        assert refusal(where, AddInclude("/h.conf")).reason == Reason.NO_HTTP
        return
    (made,) = plan(index, [AddInclude("/h.conf")])
    index.take(made.path, made.after, made.splices)
    (back,) = plan(index, [RemoveInclude("/h.conf")])
    assert back.after == path.read_bytes() != made.after
    assert b"include /h.conf;" in made.after


SITE = "http { upstream app { server a; include s.conf; keepalive 2; } upstream b { server x; %s } }"


def test_servers_of_an_included_file_are_edited_there() -> None:
    where = files(SITE % "", s=b"server b;\nserver c;")
    after = apply(where, weight("5", "c"), SetParameter("app", "b", "down", ""), AddHook("app")).files
    assert after["/n/s.conf"] == b"server b down;\nserver c weight=5;"
    assert HOOK + b" keepalive" in after[MAIN]
    where = files("http { upstream app { include s.conf; } }", s=b"server b;\nserver c;")
    assert apply(where, AddServer("app", "d")).files["/n/s.conf"] == b"server b;\nserver c;\nserver d;"
    assert apply(where, RemoveServer("app", "b")).files["/n/s.conf"] == b"server c;"
    assert apply(where, RemoveServer("app", "c")).files["/n/s.conf"] == b"server b;"


def test_a_file_that_the_same_upstream_includes_twice_is_edited_once() -> None:
    where = files("http { upstream app { include s.conf; include s*.conf; } }", s=b"server b;")
    assert apply(where, weight("5", "b")).files["/n/s.conf"] == b"server b weight=5;"


def test_a_hook_stays_in_front_of_a_keepalive_in_an_included_file() -> None:
    where = files("http { upstream app { server a; include s.conf; } }", s=b"server b; keepalive 3;")
    assert b"server a; " + HOOK + b" include" in apply(where, AddHook("app")).files[MAIN]


REFUSED = {
    Reason.NO_HTTP: [(files("events {}"), AddInclude("h"))],
    Reason.NO_UPSTREAM: [
        (files(block("server a;")), AddServer("other", "b")),
        (files("stream { upstream app { server a; } }"), weight("2")),
        (files("http { server { upstream app { server a; } } }"), AddHook("app")),
        (files("http { \ufeffupstream app { server a; } }"), weight("2")),
    ],
    Reason.NO_SERVER: [
        (files(block("server a;")), weight("2", "a:80")),
        (files(block("server a;")), weight("2", occurrence=1)),
        (files(block("server a;")), RemoveServer("app", "b")),
    ],
    Reason.NOT_THERE: [
        (files(block("server a;")), RemoveHook("app")),
        (files(block("server a;")), RemoveInclude("h.conf")),
        (files("http { server { include h.conf; } }", h=b""), RemoveInclude("h.conf")),
    ],
    Reason.EXISTS: [
        (files(block("server a;")), AddServer("app", "a")),
        (files(block(f"server a; {HOOK.decode()}")), AddHook("app")),
        (files("http { include h.conf; }", h=b""), AddInclude("h.conf")),
    ],
    Reason.AMBIGUOUS: [
        (files(block("server a;") + block("server a;")), weight("2")),
        (files("http {} http {}"), AddInclude("h.conf")),
        (files("http { include h.conf; include h.conf; }", h=b""), RemoveInclude("h.conf")),
    ],
    Reason.SHARED: [
        (files(SITE % "include s.conf;", s=b"server b;"), weight("2", "b")),
        (files("http { include u.conf; } stream { include u.conf; }", u=b"upstream app { server a; }"), AddHook("app")),
        (
            files("http { upstream app { include s.conf; } upstream b { include s.conf; } }", s=b"server b;"),
            AddServer("app", "c"),
        ),
        (
            files("http { upstream app { include s.conf; } upstream b { include ./s.conf; } }", s=b"server b;"),
            weight("2", "b"),
        ),
        (linked("http { upstream app { include s.conf; } upstream b { include l/*.conf; } }"), AddServer("app", "c")),
        (linked("http { upstream app { include l/s.conf; } upstream b { include s.conf; } }"), weight("2", "b")),
    ],
    Reason.FOREIGN_HOOK: [
        (files(block("server a; balancer_by_lua_block { }")), AddHook("app")),
        (files(block("server a; balancer_by_lua_file x.lua;")), RemoveHook("app")),
        (files(block('server a; balancer_by_lua_block { require("headgate").balance("b") }')), RemoveHook("app")),
    ],
    Reason.ORDER: [(files(block("server a; keepalive 2; least_conn;")), AddHook("app"))],
    Reason.LAST_SERVER: [(files(block("server a; server a;")), RemoveServer("app", "a"))],
    Reason.BAD_VALUE: [
        (files(block("server a;")), weight("0")),
        (files(block("server a;")), weight("2 down")),
        (files(block("server a;")), weight("")),
        (files(block("server a;")), SetParameter("app", "a", "down", "yes")),
        (files(block("server a;")), SetParameter("app", "a", "slow_start", "3s")),
        (files(block("server a;")), SetParameter("app", "a", "fail_timeout", "soon")),
        (files(block("server a;")), AddServer("app", "b:99999")),
        (files(block("server a;")), AddServer("app", "b", {"weight": "x"})),
        (files(block("server a;")), AddServer("app", "unix:/a\nb")),
        (files(block("server a;")), AddInclude("")),
        (files("http { upstream 'a\"b' { server a; } }"), AddHook('a"b')),
    ],
    # crossplane takes these two for blanks, and this `}` for the end of the block.
    Reason.UNPROVEN: [
        (files(block("server a \x0bweight=2;")), weight("3")),
        (files(block("server a x}y;")), weight("3")),
    ],
}


@pytest.mark.parametrize(
    ("reason", "where", "edit"), [(reason, *case) for reason, cases in REFUSED.items() for case in cases], ids=str
)
def test_what_cannot_be_edited_safely_is_refused_with_the_reason(reason: Reason, where: Files, edit: Edit) -> None:
    refused = refusal(where, edit)
    assert refused.reason == reason, refused
    assert "/n/" in str(refused)


@pytest.mark.parametrize(
    "edits",
    [
        [weight("2"), weight("3")],
        [weight("2"), RemoveServer("app", "a")],
        [RemoveServer("app", "a"), RemoveServer("app", "a", 0)],
    ],
)
def test_edits_that_contradict_each_other_are_refused(edits: list[Edit]) -> None:
    assert refusal(files(block("server a; server b;")), *edits).reason == Reason.CONFLICT


def test_a_refusal_names_file_and_line_and_the_remedy() -> None:
    where = files("events {}\nhttp {\n upstream app {\n  server a;\n  balancer_by_lua_block { }\n }\n}\n")
    refused = refusal(where, AddHook("app"))
    assert str(refused) == (
        '/n/nginx.conf:5: upstream "app" has a balancer hook that Headgate did not write; take it out by hand'
    )
    assert str(refused.place) == "/n/nginx.conf:5"


def test_every_reason_has_a_case_here_and_an_explanation_in_the_docs() -> None:
    assert REFUSED.keys() | {Reason.CONFLICT} == set(Reason)
    assert set(re.findall(r"^\| `(\w+)` \|", DOCS.read_text(), re.MULTILINE)) == {each.value for each in Reason}


@pytest.mark.parametrize("damage", [b" weight=6", b"; server c", b" down", b"; # a comment", b"{}"])
def test_a_change_that_was_not_meant_does_not_pass_the_proof(damage: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    splices = Draft.splices
    monkeypatch.setattr(
        Draft, "splices", lambda self: [each._replace(text=each.text + damage) for each in splices(self)]
    )
    assert refusal(files(block("server a;\n")), weight("5")).reason == Reason.UNPROVEN


def test_a_change_that_only_crossplane_sees_does_not_pass_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    read = drafts._crossplane
    monkeypatch.setattr(drafts, "_crossplane", lambda data, codec: read(data.replace(b"=5", b"=5 down"), codec))
    assert refusal(files(block("server a;")), weight("5")).reason == Reason.UNPROVEN


def test_broken_files_are_named_with_the_line() -> None:
    with pytest.raises(ConfSyntaxError, match=r'unexpected "}" in /n/nginx\.conf:2'):
        Index(MAIN, files("http {\n a }"))
    with pytest.raises(
        ConfSyntaxError, match=r'open\(\) "/n/s\.conf" failed \(No such file or directory\) in /n/nginx\.conf:2'
    ):
        Index(MAIN, files("http {\n include s.conf; }"))
    with pytest.raises(ConfSyntaxError, match=r'"/n/s\.conf" includes itself in /n/s\.conf:1'):
        Index(MAIN, files("http { include s.conf; }", s=b"include s.conf;"))


def test_only_the_file_that_changed_is_scanned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    where = files("http { include s.conf; upstream app { server a; } }", s=b"upstream b { server c; }")
    index = Index(MAIN, where)
    where.files["/n/s.conf"] += b"upstream c { server d; }"
    scanned = []
    monkeypatch.setattr("controller.conf.index._outline", lambda data, path: scanned.append(path) or ())
    Index(MAIN, where, index)
    assert scanned == ["/n/s.conf"]


def test_a_file_that_an_upstream_reads_under_two_names_is_edited_once() -> None:
    for second in ("l/s.conf", "./s.conf", "/n/l/../s.conf"):
        where = linked(f"http {{ upstream app {{ include s.conf; include {second}; }} }}")
        (made,) = plan(Index(MAIN, where), [weight("2", "b")])
        assert (made.path, made.after) == ("/n/s.conf", b"server b weight=2;")


class Stamped(Files):
    """Files with stamps, which count what is read."""

    def __init__(self, files: dict[str, bytes], links: dict[str, str] | None = None) -> None:
        super().__init__(files, links or {})
        self.stamps: dict[str, object] = {}
        self.reads: list[str] = []

    def look(self, path: str) -> Look:
        real = super().look(path).real
        names = tuple(each for each in (*self.files, *self.links) if posixpath.dirname(each) == real)
        return Look(real, self.stamps.get(real, names or 1))

    def read(self, path: str) -> bytes:
        self.reads.append(path)
        return super().read(path)


def test_only_what_its_stamp_does_not_vouch_for_is_read_again() -> None:
    where = Stamped(
        {
            MAIN: b"http { include *.d; upstream app { server a; } }",
            "/n/a.d": b"upstream a { server a; }",
            "/n/b.d": b"",
        },
        {"/n/l.d": "/n/b.d"},
    )
    index = Index(MAIN, where)
    assert where.reads == [MAIN, "/n/a.d", "/n/b.d"]
    where.reads.clear()
    assert index.current(where) is index
    assert where.reads == []
    where.stamps = {"/n/a.d": 2}
    assert index.current(where) is index, "a touch"
    assert where.reads == ["/n/a.d"]
    where.reads.clear()
    assert index.current(where) is index
    assert where.reads == [], "the new stamp is known"
    where.stamps = {"/n/a.d": None}
    where.files["/n/a.d"] = b"upstream b { server b; }"
    second = index.current(where)
    assert second.holds("b")
    assert not second.holds("a")
    assert set(where.reads) == {"/n/a.d"}
    where.files["/n/c.d"] = b"upstream c { server c; }"
    third = second.current(where)
    assert third.holds("c"), "a new name in the directory"
    where.links = {"/n/l.d": "/n/a.d"}
    assert third.current(where).current(where).contexts("/n/a.d") == {(b"http",)}


def test_files_without_anything_of_an_upstream_are_looked_at_when_one_is_sought() -> None:
    where = Stamped(
        {
            MAIN: b"http { include *.d; upstream app { include lines; } }",
            "/n/lines": b"server a;",
            "/n/site.d": b"server { listen 80; location / { proxy_pass http://app; } }",
        }
    )
    index = Index(MAIN, where)
    where.stamps = {"/n/site.d": 2, "/n/lines": 2}
    where.files["/n/site.d"] = b"upstream late { server b; }"
    where.reads.clear()
    assert index.current(where) is index
    assert where.reads == ["/n/lines"], "what stands within an upstream may change it"
    assert not index.holds("late")
    assert index.current(where, whole=True).holds("late")


def test_after_an_own_edit_a_stamp_vouches_for_nothing() -> None:
    where = Stamped({MAIN: block("server a;").encode()})
    index = Index(MAIN, where)
    (made,) = plan(index, [weight("2")])
    index.take(made.path, made.after, made.splices)
    current = index.current(where)
    assert current.data(MAIN) == where.files[MAIN], "nobody wrote the edit"
    assert current.blocks((b"http", b"app"))


def test_an_edit_scans_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(MAIN, files(FORMS["many lines"]))
    monkeypatch.setattr("controller.conf.index._outline", lambda data, path: pytest.fail("scanned"))
    for edits in ([weight("3"), AddServer("app", "b")], [AddHook("app")], [RemoveServer("app", "a")]):
        (made,) = plan(index, edits)
        index.take(made.path, made.after, made.splices)
    assert b"server b;" in index.data(MAIN)
    assert b"server a" not in index.data(MAIN)


@pytest.mark.parametrize("end", [b"\n", b"", b"\r\n"])
def test_the_diff_is_one_that_patch_applies(tmp_path: Path, end: bytes) -> None:
    lines = b"".join(b"    log_format f%d x;\n" % n for n in range(30))
    where = files(
        b"http {\n"
        + lines
        + b"    upstream app {\n        server a;\n    }\n"
        + lines
        + b"    upstream b { server c; }\n}"
        + end
    )
    edits = [AddInclude("h.conf"), AddHook("app"), weight("3"), SetParameter("b", "c", "down", "")]
    (made,) = plan(Index(MAIN, where), edits)
    shown = diff(made)
    assert shown.count("\n@@ ") == 3
    (tmp_path / "nginx.conf").write_bytes(made.before)
    subprocess.run(
        ["patch", "--binary", "--quiet", "nginx.conf"], cwd=tmp_path, input=shown.encode(), check=True, timeout=20
    )
    assert (tmp_path / "nginx.conf").read_bytes() == made.after
