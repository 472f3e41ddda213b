"""controller.conf.parse.Cache: only what changed is parsed, and the outcome is as if all were."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.conf.parse import Cache, ConfSyntaxError, Tree, parse
from tests.conf.test_parse import HOOK, Texts

MAIN = "/etc/nginx.conf"


def site(number: int, port: int) -> str:
    return (
        f"upstream app{number} {{ server 127.0.0.1:{port}; {HOOK.replace('app', f'app{number}')} }}\n"
        f"server {{ listen 80; location / {{ proxy_pass http://app{number}; include proxy.inc; }} }}\n"
    )


@pytest.fixture
def texts() -> Texts:
    return Texts({MAIN: "http { include sites/*.conf; }", "/etc/proxy.inc": "proxy_set_header Host $host;"})


def test_an_edit_of_one_file_of_a_thousand_parses_one_file(texts: Texts) -> None:
    texts |= {f"/etc/sites/{number:04}.conf": site(number, 8000) for number in range(1000)}
    cache = Cache()
    assert parse(MAIN, texts, cache) == parse(MAIN, texts)
    assert cache.parsed == 1002
    texts["/etc/sites/0500.conf"] = site(500, 9000)
    tree = parse(MAIN, texts, cache)
    assert cache.parsed == 1003
    assert [line.port for line in tree.upstreams[500].servers] == [9000]
    assert tree == parse(MAIN, texts)
    assert len(tree.files) == 1002


def test_patterns_are_evaluated_anew_and_only_new_files_are_parsed(texts: Texts) -> None:
    cache = Cache()
    parse(MAIN, texts, cache)
    texts["/etc/sites/1.conf"] = site(1, 81)
    assert [each.name for each in parse(MAIN, texts, cache).upstreams] == ["app1"]
    assert cache.parsed == 3
    del texts["/etc/sites/1.conf"]
    assert parse(MAIN, texts, cache).upstreams == ()
    assert cache.parsed == 3


def test_a_broken_file_costs_no_other_file_its_place(texts: Texts) -> None:
    texts |= {f"/etc/sites/{number}.conf": site(number, 81) for number in range(4)}
    cache = Cache()
    before = parse(MAIN, texts, cache)
    parsed = cache.parsed
    mended, texts["/etc/sites/1.conf"] = texts["/etc/sites/1.conf"], "upstream {"
    for _ in range(2):
        with pytest.raises(ConfSyntaxError, match=r"/etc/sites/1\.conf:1"):
            parse(MAIN, texts, cache)
    texts["/etc/sites/1.conf"] = mended
    assert parse(MAIN, texts, cache) == before
    assert cache.parsed == parsed + 2  # the broken one, each time: it was still known as it had been


def test_files_that_left_the_tree_are_forgotten(texts: Texts) -> None:
    cache = Cache()
    texts["/etc/sites/1.conf"] = site(1, 81)
    parse(MAIN, texts, cache)
    mine = texts.pop("/etc/sites/1.conf")
    parse(MAIN, texts, cache)
    texts["/etc/sites/1.conf"] = mine
    parsed = cache.parsed
    parse(MAIN, texts, cache)
    assert cache.parsed == parsed + 2  # the site, and what only it included


def test_equal_files_under_two_paths_keep_their_own_places(texts: Texts) -> None:
    texts |= {"/etc/sites/1.conf": site(1, 81), "/etc/sites/2.conf": site(2, 81)}
    cache = Cache()
    parse(MAIN, texts, cache)
    texts["/etc/sites/1.conf"], texts["/etc/sites/2.conf"] = texts["/etc/sites/2.conf"], texts["/etc/sites/1.conf"]
    assert [str(each.place) for each in parse(MAIN, texts, cache).upstreams] == [
        "/etc/sites/1.conf:1",
        "/etc/sites/2.conf:1",
    ]


def test_includes_are_found_however_deep_they_stand(texts: Texts) -> None:
    texts[MAIN] = "http { server { location / { if ($a) { include proxy.inc; } } } map $a $b { include *.map; } }"
    texts["/etc/x.map"] = "a b;"
    assert parse(MAIN, texts).files == (MAIN, "/etc/proxy.inc", "/etc/x.map")


CONTENTS = st.sampled_from(
    [
        "",
        site(1, 81),
        site(1, 82),
        site(2, 81),
        "server { include proxy.inc; }",
        "upstream app3 { include servers.inc; }",
        "upstream broken {",
        "include sites/*.conf;",
        "include gone.inc;",
    ]
)
EDITS = st.lists(
    st.tuples(st.sampled_from(["/etc/sites/a.conf", "/etc/sites/b.conf", "/etc/proxy.inc"]), st.none() | CONTENTS),
    max_size=8,
)


def outcome(texts: Texts, cache: Cache | None) -> Tree | str:
    try:
        return parse(MAIN, texts, cache)
    except ConfSyntaxError as error:
        return str(error)


@given(EDITS)
def test_after_any_edits_the_outcome_is_that_of_parsing_all(edits: list[tuple[str, str | None]]) -> None:
    texts = Texts({MAIN: "http { include sites/*.conf; }", "/etc/servers.inc": "server a; server b;"})
    cache = Cache()
    for path, content in edits:
        if content is None:
            texts.pop(path, None)
        else:
            texts[path] = content
        assert outcome(texts, cache) == outcome(texts, None)
