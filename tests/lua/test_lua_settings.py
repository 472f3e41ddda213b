"""Whatever headgate.toml is accepted, nginx takes the table that is made of it: one that it refused would publish
nothing, and no drain would work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from controller.core import table
from controller.core.events import ConfigRead
from controller.core.model import Admin, Agent, Group, Health, Peer, State, Upstream, Warmth, WarmUp
from controller.core.step import step
from controller.errors import SettingsError
from controller.settings import build
from tests.core.world import server
from tests.support.nginx import ROOT

NOW = 1000.0
JUDGE = """
local cjson, format = require("cjson"), require("headgate.table")
for line in io.lines() do
  local wrong = format.validate(cjson.decode(line))
  io.write(wrong and wrong.message or "accepted", "\\n")
  io.flush()
end
"""

DURATIONS = st.one_of(
    st.sampled_from([0, "0s", "0.2ms", "0.6ms", "1ms", "10s", "30s", "300s", "400s", "8760h", "1" + "0" * 306 + "s"]),
    st.builds("{}{}".format, st.integers(0, 10**400), st.sampled_from(["ms", "s", "h"])),
    st.floats(0, 1e6),
)
COUNTS = st.one_of(st.integers(0, 8), st.integers(0, 2**70))
NUMBERS = st.one_of(st.sampled_from([0, 1, 1.25, 2, float("inf"), float("nan")]), st.floats(0, 1e9))
SHARES = st.one_of(st.sampled_from(["0%", "10%", "100%", 0.5]), st.floats(0, 1))
TEXTS = st.text(st.characters(codec="utf-8"), max_size=6)
PATHS = st.one_of(st.sampled_from(["/", "/shop", "/a;Secure", "/é", "shop"]), TEXTS.map("/{}".format))
FLAGS = st.booleans()
KEYS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "outlier": {
        **dict.fromkeys(("errors", "timeouts", "server_errors"), COUNTS),
        "base": DURATIONS,
        "cap": DURATIONS,
        "max_ejected": SHARES,
    },
    "sticky": {
        "cookie": st.one_of(st.sampled_from(["route", "two words", ""]), TEXTS),
        "path": PATHS,
        "secure": FLAGS,
        "http_only": FLAGS,
        "same_site": st.sampled_from(["Lax", "Strict", "None"]),
        "max_age": COUNTS,
    },
    "balance": {
        "method": st.sampled_from(["", "round_robin", "least_conn", "ewma", "hash", "ip_hash", "random"]),
        "key": st.one_of(st.sampled_from(["$uri", "${a}b", "$"]), TEXTS.map("$a{}".format)),
        "consistent": FLAGS,
        "bound": NUMBERS,
        "two": FLAGS,
    },
    "warm_up": {
        "duration": DURATIONS,
        "curve": NUMBERS,
        "floor": SHARES,
        "steps": COUNTS,
        "starts": st.sampled_from(["first-request", "healthy"]),
        "ignore_paths": st.lists(PATHS, max_size=3),
    },
    "quarantine": {"duration": DURATIONS, "marks": FLAGS},
    "health": {"flap_hold": DURATIONS, "flap_cap": DURATIONS},
}
# Few keys at a time: of many one is nearly always refused.
TABLES = st.lists(
    st.sampled_from([(name, key) for name in KEYS for key in KEYS[name]]), max_size=4, unique=True
).flatmap(lambda chosen: st.tuples(*(st.tuples(st.just(place), KEYS[place[0]][place[1]]) for place in chosen)))
PEERS = st.builds(
    Peer,
    health=st.just(Health.UP),
    admin=st.sampled_from(list(Admin)),
    agent=st.builds(
        Agent, weight=st.sampled_from([0.0, 0.01, 1.0, 256.0]), max_conns=st.sampled_from([0, 999_999_999])
    ),
    warm_up=st.builds(
        WarmUp, st.sampled_from(list(Warmth)), st.floats(0, 200), st.just(NOW - 5), epoch=st.integers(0, 9)
    ),
)


def tables(values: tuple[tuple[tuple[str, str], Any], ...]) -> dict[str, dict[str, Any]]:
    """As headgate.toml nests them. Without a cookie nothing would be told of sessions."""
    nested: dict[str, dict[str, Any]] = {}
    for (name, key), value in values:
        nested.setdefault(name, {"cookie": "route"} if name == "sticky" else {})[key] = value
    return nested


@pytest.fixture(scope="module")
def judge() -> Iterator[subprocess.Popen[str]]:
    """lua/headgate/table.lua, which answers a table a line."""
    if shutil.which("lua5.1") is None:
        pytest.skip("lua5.1 is not installed (apt-get install lua-busted)")
    with subprocess.Popen(
        ["lua5.1", "-e", JUDGE],
        env={**os.environ, "LUA_PATH": f"{ROOT}/lua/?.lua;;"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@settings(max_examples=100, deadline=None)
@given(
    TABLES.map(tables),
    TABLES.map(tables),
    st.sampled_from(["round_robin", "hash"]),
    st.sampled_from([0, 7, 2**31, 10**17]),
    st.lists(PEERS, min_size=2, max_size=2),
)
@example({"sticky": {"cookie": "a", "max_age": 2**31}}, {"warm_up": {"duration": "1ms"}}, "hash", 7, [Peer(), Peer()])
@example({"sticky": {"cookie": "route", "path": "/a;Secure"}}, {}, "hash", 0, [Peer(), Peer()])
@example({"outlier": {"base": "400s"}}, {"outlier": {"cap": "400s"}}, "hash", 0, [Peer(), Peer()])
@example({"outlier": {"base": "0.2ms"}}, {}, "hash", 0, [Peer(), Peer()])
@example({"quarantine": {"duration": "1" + "0" * 306 + "s"}}, {}, "hash", 0, [Peer(), Peer()])
def test_nginx_takes_the_table_of_all_settings_that_are_accepted(
    judge: subprocess.Popen[str],
    defaults: dict[str, Any],
    own: dict[str, Any],
    method: str,
    max_conns: int,
    peers: list[Peer],
) -> None:
    try:
        accepted = build({"defaults": defaults, "upstream": {"app": own}}, {}, "headgate.toml")
    except SettingsError:
        event("refused")
        return
    servers = (server(8001, weight=10**17, max_conns=max_conns), server(8002))
    before = Upstream("app", servers, method=method, hash_key="$uri", consistent=True)
    groups = {
        name: Group(replace(before, name=name), dict(zip((each.key for each in servers), peers, strict=True)))
        for name in ("app", "other")
    }
    read = tuple(replace(each.upstream, policy=accepted.policy_for(name)) for name, each in groups.items())
    state, _ = step(State(revision=1, groups=groups, configured=True), ConfigRead(read), NOW)
    assert judge.stdin is not None
    assert judge.stdout is not None
    judge.stdin.write(json.dumps(table.table(state, NOW)) + "\n")
    judge.stdin.flush()
    assert judge.stdout.readline() == "accepted\n"
