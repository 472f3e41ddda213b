"""A plan held against what then happens: a real rollout under load, behind a real nginx."""

from __future__ import annotations

import subprocess
import sys

import pytest

from controller.demo.stage import UPSTREAM, Stage, until

LEAST = 150  # requests in a window in which a share is measured, so that chance is a small part of it


def test_the_peak_load_of_a_rollout_is_within_a_tenth_of_the_planned_one() -> None:
    with Stage("gthread", servers=4, warm_up=2.0) as stage:
        client = stage.client
        load = stage.load(120, "--mix", "fast=9,echo=1")

        def counted() -> dict[str, int]:
            return {each["address"]: each["requests"] for each in client.upstream(UPSTREAM)["servers"]}

        until(lambda: sum(counted().values()) > LEAST, "traffic", 30.0, stage.prefix / "load.log")
        planned = client.plan(UPSTREAM)
        assert planned["rate"] is None or planned["rate"] > 0
        seen = [counted()]
        change = client.begin_change("rollout", UPSTREAM)
        seen += [counted() for _ in client.follow_change(change, every=0.2)]
        record = client.change(change)
        assert record["status"] == "done", record["error"]
        assert load.finish()["failed"] == 0

        assert _peak(seen) == pytest.approx(planned["load"] / len(stage.addresses), rel=0.1)
        plan, outcome = record["plan"], record["outcome"]
        assert plan["load"] == pytest.approx(planned["load"], rel=0.01)
        assert outcome["load"] == pytest.approx(plan["load"], rel=0.1)
        assert (plan["serving"], plan["before"], outcome["serving"]) == (3, 4, 3)
        assert outcome["server"] in stage.addresses
        assert outcome["duration"] == pytest.approx(record["ended_at"] - record["created_at"])
        assert outcome["rate"] == pytest.approx(120, rel=0.2)
        command = [sys.executable, "-m", "controller", "--config", str(stage.settings), "changes", str(change)]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert "PLANNED" in shown
        assert f"peak load  {plan['load']:.2f} × at {plan['server']}" in shown
        assert f"{outcome['load']:.2f} × at {outcome['server']}" in shown


def _peak(seen: list[dict[str, int]]) -> float:
    """The largest part of the requests that a server got in any window; each begins anew once it has enough."""
    peak, begin = 0.0, seen[0]
    for now in seen:
        gained = {key: now[key] - begin[key] for key in now}
        if sum(gained.values()) >= LEAST:
            peak = max(peak, *(count / sum(gained.values()) for count in gained.values()))
            begin = now
    return peak
