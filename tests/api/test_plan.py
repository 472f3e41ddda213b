"""Plans over the API and by the command, with a daemon and without one; and the guard that they explain."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from controller.client import Client
from controller.core.policy import RolloutPolicy, WarmUpPolicy
from controller.errors import ApiError
from tests.support.house import APP, POLICY, House

FIRST, SECOND, THIRD = (server.key for server in APP.servers)
WARM = replace(
    APP,
    policy=replace(POLICY, warm_up=WarmUpPolicy(duration=60.0, starts="healthy"), rollout=RolloutPolicy(max_load=2.0)),
)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    (tmp_path / "headgate.toml").write_text(f'[api]\nsocket = "{tmp_path}/run/api.sock"\nlisten = ""\n')
    with House(tmp_path) as started:
        started.source.config = replace(started.source.config, upstreams=(WARM,))
        Client(str(started.socket)).reread()
        yield started


@pytest.fixture
def client(house: House) -> Client:
    return Client(str(house.socket))


def headgate(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "controller", "--config", f"{directory}/headgate.toml", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_a_plan_shows_each_batch_and_recommends_one_and_begins_nothing(client: Client) -> None:
    made = client.plan("app")
    assert (made["count"], made["batch"], made["error"], made["warnings"]) == (3, 1, "", [])
    assert [batch["servers"] for batch in made["batches"]] == [[FIRST], [SECOND], [THIRD]]
    assert made["loads"] == pytest.approx({FIRST: 1.5, SECOND: 1.5, THIRD: 1.5})
    assert made["capacity"] == pytest.approx(2 / 3)
    assert made["duration"] > 3 * 60
    assert (made["advice"]["batch"], made["advice"]["safe"]) == (1, True)
    assert len(made["samples"]) == 60
    assert client.changes() == []


def test_how_long_steps_took_is_learned_from_earlier_operations(client: Client) -> None:
    assert client.plan("app")["seconds"]["exit"] == 1.0
    *_, record = client.follow_change(client.begin_change("stop", "app", (FIRST,)))
    assert record["status"] == "done"
    (took,) = [step["ended_at"] - step["started_at"] for step in record["steps"] if step["name"] == "exit"]
    made = client.plan("app")
    assert made["seconds"]["exit"] == pytest.approx(took)
    assert [batch["servers"] for batch in made["batches"]] == [[SECOND], [THIRD]], "who is ready"


@pytest.mark.parametrize(
    ("values", "status", "code"),
    [
        ({"upstream": "nothere"}, 404, "not_found"),
        ({"upstream": "app", "servers": ("nothere",)}, 404, "not_found"),
        ({"upstream": "app", "batch": "0"}, 422, "invalid"),
        ({"upstream": "app", "batch": "150%"}, 422, "invalid"),
        ({"upstream": "app", "batch": "x"}, 422, "invalid"),
        ({"upstream": "app", "capacity": -1}, 422, "invalid"),
        ({"upstream": "app", "max_unavailable": "0"}, 422, "invalid"),
        ({"upstream": "app", "kind": "deploy"}, 422, "invalid"),
        ({"upstream": "app", "kind": "scale"}, 422, "invalid"),
        ({"upstream": "app", "kind": "nothing"}, 422, "invalid"),
        ({"upstream": "app", "batch": 3}, 409, "guard"),
    ],
)
def test_what_cannot_be_planned_is_refused(client: Client, values: dict[str, object], status: int, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        client.plan(**values)  # type: ignore[arg-type]
    assert (caught.value.status, caught.value.code) == (status, code)


def test_a_rollout_beyond_max_load_warns_and_is_refused_unless_forced(house: House, client: Client) -> None:
    done = headgate(house.directory, "rollout", "app", "--batch", "2", "--no-wait")
    assert done.returncode == 4
    assert "mind: " in done.stderr
    assert "3.00 times its usual share, and max_load is 2" in done.stderr
    assert client.changes() == []
    done = headgate(house.directory, "rollout", "app", "--batch", "2", "--force", "--no-wait")
    assert done.returncode == 0, done.stderr
    assert [change["kind"] for change in client.changes()] == ["rollout"]


def test_what_goes_in_batches_can_be_planned_and_warns_before_it_begins(house: House, client: Client) -> None:
    for kind, more in (("reload", ()), ("upgrade", ()), ("scale", ("--workers", "2"))):
        done = headgate(house.directory, "plan", kind, "app", "--batch", "3", "--max-unavailable", "1", *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{kind} of app: 1 batch of 3, about ")
        assert "gets up to 1.50 times its usual share" in done.stdout
        done = headgate(house.directory, kind, "app", "--batch", "2", *more)
        assert done.returncode == 4
        assert "mind: " in done.stderr
        assert "3.00 times its usual share, and max_load is 2" in done.stderr
    assert client.changes() == []


def test_while_a_change_runs_another_can_be_planned_and_queued(house: House, client: Client) -> None:
    house.do(house.processes.stuck.clear)
    first = client.begin_change("restart", "app", (FIRST,))
    done = headgate(house.directory, "plan", "rollout", "app")
    assert done.returncode == 0, done.stderr
    assert f"mind: change {first} (restart) of app comes first" in done.stdout
    done = headgate(house.directory, "rollout", "app", "--no-wait")
    assert (done.returncode, f"change {first} (restart) of app is still running" in done.stderr) == (4, True)
    done = headgate(house.directory, "rollout", "app", "--queue", "--no-wait")
    assert done.returncode == 0, done.stderr
    queued = client.changes()[0]
    assert done.stdout.startswith(f"change {queued['id']}: rollout of app is queued; follow it with: ")
    assert queued["status"] == "queued"
    assert {step["server"] for step in client.change(queued["id"])["steps"]} == {FIRST, SECOND, THIRD}
    client.steer(queued["id"], "abort")
    house.do(house.processes.stuck.set)


def test_the_command_shows_a_plan_for_people_and_as_json(house: House, client: Client) -> None:
    done = headgate(house.directory, "plan", "rollout", "app", "--batch", "2", "--capacity", "100")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("rollout of app: 2 batches of 2, about ")
    assert f"{FIRST}, {SECOND}" in done.stdout
    assert "3.00 × its usual share at " in done.stdout
    assert "mind: " in done.stdout
    assert "recommended: --batch 1 (peak load 1.50 ×" in done.stdout
    shown = headgate(house.directory, "rollout", "app", "--plan")
    assert shown.returncode == 0
    assert shown.stdout.startswith("rollout of app: 3 batches of 1, about ")
    assert json.loads(headgate(house.directory, "plan", "stop", "app", FIRST, "--json").stdout)["load"] == 1.5
    assert headgate(house.directory, "plan", "rollout", "app", "--batch", "0%").returncode == 2
    assert client.changes() == []


def test_without_a_daemon_it_is_planned_from_the_files(tmp_path: Path) -> None:
    (tmp_path / "nginx.conf").write_text(
        "events {}\nhttp { upstream app { server 127.0.0.1:8001 weight=3; server 127.0.0.1:8002; } }\n"
    )
    (tmp_path / "headgate.toml").write_text(
        f'[nginx]\nconf = "{tmp_path}/nginx.conf"\n[api]\nsocket = "{tmp_path}/api.sock"\n'
        '[upstream.app.process]\nstart = ["serve"]\n[upstream.app.warm_up]\nduration = "30s"\n'
    )
    done = headgate(tmp_path, "plan", "rollout", "app")
    assert done.returncode == 0, done.stderr
    assert "no daemon runs" in done.stderr
    assert "4.00 × its usual share at 127.0.0.1:8002" in done.stdout
    assert "recommended: none" in done.stdout
    assert headgate(tmp_path, "plan", "rollout", "other").returncode == 2
    assert headgate(tmp_path, "plan", "rollout", "app", "--batch", "2").returncode == 4
