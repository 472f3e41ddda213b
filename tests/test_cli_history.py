"""`headgate history` and `headgate explain` as people run them, and what they show of an answer."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import RenderableType

from controller import cli_view
from controller.client import Client
from tests.support.house import APP, House
from tests.support.nginx import wait_until

FIRST, SECOND, THIRD = (server.key for server in APP.servers)
AT = 1_700_000_000


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    (tmp_path / "headgate.toml").write_text(f'[api]\nsocket = "{tmp_path}/run/api.sock"\nlisten = ""\n')
    with House(tmp_path) as started:
        yield started


def headgate(house: House, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "controller", "--config", f"{house.directory}/headgate.toml", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def shown(what: RenderableType) -> list[str]:
    out = io.StringIO()
    cli_view.console(out).print(what)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def point(at: int, requests: float, **more: float) -> dict[str, Any]:
    return {"at": at, "requests": requests, "errors": 0, "failures": 0, **more}


def test_history_has_a_line_a_step_with_its_rates_and_events() -> None:
    answer = {
        "since": AT,
        "until": AT + 60,
        "step": 10,
        "servers": [
            {"server": "a:1", "points": [point(AT + 10, 25), point(AT + 30, 5, errors=3, failures=1)]},
            {"server": "b:1", "points": [point(AT + 10, 12_345), point(AT + 50, 1)]},
        ],
        "events": [{"at": AT + 31.5, "text": "app: a:1 drains"}, {"at": AT + 39.9, "text": "app: [::1]:1 is down"}],
    }
    times = [cli_view.clock(AT + 10 * step) for step in range(6)]
    header, *lines = shown(cli_view.history(answer, now=AT + 55))
    assert header.split() == ["TIME", "a:1", "b:1", "ERRORS", "FAILURES", "EVENTS"]
    assert [line.split() for line in lines] == [
        [times[1], "2.5", "1,234.5"],
        [times[2], "·", "·"],
        [times[3], "0.5", "·", "3", "1", "app:", "a:1", "drains"],
        ["app:", "[::1]:1", "is", "down"],
        [times[4], "·", "·"],
        [times[5], "…", "…"],
    ]


def test_history_of_nothing_is_its_header() -> None:
    answer = {"since": AT, "until": AT + 60, "step": 10, "servers": [{"server": "a:1", "points": []}], "events": []}
    assert len(shown(cli_view.history(answer, now=AT + 99))) == 1


def test_history_shows_what_nginx_counted(house: House) -> None:
    house.plane.served = {FIRST: 500}
    client = Client(str(house.socket))
    wait_until(lambda: client.traffic("app")["servers"][0]["points"], "the counters are read")
    done = headgate(house, "history", "app", "--since", "2m", "--step", "30s")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].split()[:4] == ["TIME", FIRST, SECOND, THIRD]
    assert f"app: {FIRST} is up" in done.stdout
    answer = json.loads(headgate(house, "history", "app", "--since", "2m", "--step", "30s", "--json").stdout)
    assert answer["step"] == 30
    assert answer["until"] >= time.time() - 60
    assert sum(each["requests"] for each in answer["servers"][0]["points"]) == pytest.approx(500, abs=0.01)


@pytest.mark.parametrize("words", [("--since", "yesterday"), ("--step", "0s")])
def test_history_refuses_a_time_that_is_none(house: House, words: tuple[str, str]) -> None:
    done = headgate(house, "history", "app", *words)
    assert done.returncode == 2
    assert words[0] in done.stderr


def test_explain_answers_in_sentences(house: House) -> None:
    assert headgate(house, "maint", "app", FIRST).returncode == 0
    done = headgate(house, "explain", "app", FIRST)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:3] == [f"app: {FIRST}", "", "Does it get traffic now?"]
    assert lines[3].startswith("  No new request goes to it: it is under maintenance, since ")
    assert done.stdout.endswith(".\n")
    assert json.loads(headgate(house, "explain", "app", FIRST, "--json").stdout)["upstream"] == "app"
    assert headgate(house, "explain", "app", "nobody").returncode == 2
