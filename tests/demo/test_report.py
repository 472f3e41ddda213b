"""The figures that the demo shows."""

import io
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from controller.core.model import StepName
from controller.core.policy import WarmUpPolicy
from controller.demo import report
from controller.demo.load import FAILURES

POLICY = WarmUpPolicy(duration=6.0, curve=1.0, floor=0.1, starts="healthy")


def tick(begin: float, a: int, b: int, c: int, width: float = 0.5) -> report.Tick:
    return {"from": begin, "to": begin + width, "servers": {"a": a, "b": b, "c": c}}


def step(server: str, name: str, begun: float, ended: float | None, state: str = "done") -> dict[str, object]:
    return {"server": server, "name": name, "started_at": begun, "ended_at": ended, "state": state, "detail": ""}


def text(thing: object) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(thing)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_shares_are_parts_of_all_requests_in_the_ticks() -> None:
    assert report.shares([tick(0, 10, 20, 10), tick(1, 0, 0, 40)]) == {"a": 0.125, "b": 0.25, "c": 0.625}
    assert report.shares([]) == {}


def test_a_warming_servers_part_is_set_beside_the_formulas() -> None:
    # weight 0.1 (floor) of 2.1, then 0.5 of 2.5; what lies outside of the warm-up does not count
    ticks = [tick(99.0, 70, 70, 70), tick(100.0, 10, 100, 100), tick(102.75, 50, 100, 100), tick(106.0, 70, 70, 70)]
    first, second = report.warming(ticks, "a", 100.0, POLICY, others=2)
    assert (first.begin, first.end, first.requests) == (0.0, 1.0, 210)
    assert first.measured == pytest.approx(10 / 210)
    assert first.formula == pytest.approx(0.1 / 2.1)
    assert (second.begin, second.measured, second.formula) == (3.0, 0.2, pytest.approx(0.5 / 2.5))


def test_a_window_without_requests_is_left_out() -> None:
    assert report.warming([tick(100.0, 0, 0, 0)], "a", 100.0, POLICY, others=2) == []


def test_every_step_of_a_change_has_words() -> None:
    assert set(report.STAGES) == set(StepName)


def test_steps_add_up_and_those_left_out_take_no_time() -> None:
    record = {"steps": [step("a", "terminate", 10.0, 10.5), step("a", "exit", 10.5, 12.0)]}
    record["steps"].append({"server": "a", "name": "kill", "started_at": None, "ended_at": None, "state": "skipped"})
    assert report.took(record, "a", "terminate", "exit", "kill") == 2.0


def test_failures_are_shown_with_their_meaning_and_examples() -> None:
    good = text(report.failures_table({"failed": 0, "failures": {}, "examples": []}))
    assert all(f"{kind} 0" in good for kind in FAILURES)
    bad = text(report.failures_table({"failed": 2, "failures": {"reset": 2}, "examples": ["12.5 fast: reset"]}))
    assert FAILURES["reset"] in bad
    assert "12.5 fast: reset" in bad


def test_the_moving_picture_names_each_servers_stage_weight_and_rate() -> None:
    servers = [{"address": name, "effective_weight": 1.0, "in_flight": 3} for name in "abc"]
    steps = [
        step("a", "empty", 10.0, 11.0),
        step("a", "exit", 11.0, None, "running"),
        step("b", "empty", 0, 0, "pending"),
    ]
    steps.append(step("c", "warm", 1.0, 9.0))
    ticks = [{**tick(10.0, 0, 50, 50, 1.0), "requests": 1234, "failures": {"reset": 1}, "in_flight": 6}]
    picture = text(
        report.live_view({"upstreams": [{"servers": servers}]}, {"steps": steps, "created_at": 2.0}, ticks, 12.5)
    )
    rows = {line.split()[0]: line for line in picture.splitlines() if line.strip()}
    assert "master and workers ending 1.5 s" in rows["a"]
    assert "serving" in rows["b"]
    assert "50" in rows["b"]
    assert "serving, restarted" in rows["c"]
    assert "1,234 requests, 1 failed, 6 in flight, 0 restarted in 10 s" in picture


def test_what_to_try_can_be_pasted_from_a_path_with_a_space() -> None:
    headgate = ["/a stranger's/bin/headgate", "--config", "/tmp/x y/headgate.toml"]
    lines = report.suggestions(headgate, "app", "127.0.0.1:8001", "http://127.0.0.1:80", Path("/tmp/x y/api.sock"))
    words = [shlex.split(line) for line in lines]
    assert words[:3] == [
        [*headgate, "status", "--watch"],
        [*headgate, "restart", "app", "127.0.0.1:8001"],
        [*headgate, "events", "--follow"],
    ]
    assert words[-1] == ["curl", "--unix-socket", "/tmp/x y/api.sock", "http://headgate/v1/status"]
