"""The routes over the unix socket of a real runtime: what they answer, and what happens then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from controller.client import Client
from controller.errors import ApiError
from tests.support.house import APP, House

FIRST, SECOND, THIRD = (server.key for server in APP.servers)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with House(tmp_path, listen="127.0.0.1:0") as started:
        yield started


@pytest.fixture
def client(house: House) -> Client:
    return Client(str(house.socket))


def refusal(call: Any, *values: Any, **options: Any) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        call(*values, **options)
    assert caught.value.message
    assert caught.value.remedy
    return caught.value.status, caught.value.code


def server(client: Client, address: str, upstream: str = "app") -> dict[str, Any]:
    (found,) = client.servers(upstream, address)
    return found


def test_status_has_the_shape_of_the_design(client: Client) -> None:
    status = client.status()
    assert list(status) == ["revision", "data_plane", "offline", "config", "upstreams"]
    assert status["config"] == {"state": "ok", "error": None}
    assert status["data_plane"] == "lua"
    assert [upstream["name"] for upstream in status["upstreams"]] == ["app", "named"]
    assert list(status["upstreams"][0]) == ["name", "method", "fail_open", "servers"]
    assert status["upstreams"][0]["servers"][0] == {
        "address": FIRST,
        "weight": 1,
        "effective_weight": 1.0,
        "admin": "ready",
        "health": "up",
        "reason": server(client, FIRST)["reason"],
        "warm_up": {"phase": "none", "elapsed": 0.0, "duration": 0.0, "share": 1.0, "why": ""},
        "quarantine": [],
        "ejected": None,
        "held": None,
        "agent": None,
        "in_flight": 0,
        "requests": 100,
        "answered": 98,
        "errors": 4,
        "failures": 2,
        "timeouts": 1,
        "response_time": 0.025,
        "change": None,
    }


def test_a_broken_nginx_conf_is_shown_beside_the_last_good_reading(house: House, client: Client) -> None:
    from controller.core.events import ConfigFailed

    house.do(lambda: house.runtime.post(ConfigFailed("nginx.conf:7: unexpected }")))
    house.until(lambda: bool(house.runtime.state.config_error))
    status = client.status()
    assert status["config"] == {"state": "error", "error": "nginx.conf:7: unexpected }"}
    assert len(status["upstreams"]) == 2


def test_reading_the_configuration_again_answers_when_nginx_follows_it(house: House, client: Client) -> None:
    fewer = replace(APP, servers=APP.servers[:2])
    house.source.config = replace(house.source.config, upstreams=(fewer,), warnings=("nginx.conf:1: odd",))
    before = client.status()["revision"]
    answer = client.reread()
    assert answer == {"revision": house.plane.revision, "warnings": ["nginx.conf:1: odd"]}
    assert house.plane.revision > before
    assert [each["address"] for each in client.upstream("app")["servers"]] == [FIRST, SECOND]
    assert client.reread()["revision"] == answer["revision"], "what is the same makes no new table"


def test_a_configuration_that_cannot_be_read_is_refused_and_shown(house: House, client: Client) -> None:
    house.source.error = "nginx.conf:7: unexpected }"
    assert refusal(client.reread) == (422, "config")
    assert client.status()["config"] == {"state": "error", "error": "nginx.conf:7: unexpected } (mend it)"}
    assert len(client.status()["upstreams"]) == 2
    house.source.error = ""
    client.reread()
    assert client.status()["config"] == {"state": "ok", "error": None}


def test_a_configuration_that_nginx_does_not_follow_is_said_to_be_read(house: House, client: Client) -> None:
    house.source.config = replace(house.source.config, upstreams=(replace(APP, servers=APP.servers[:1]),))
    house.plane.error = "nginx is away"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("controller.api.app.PUBLISH_SECONDS", 0.1)
        assert refusal(client.reread) == (503, "not_published")
    assert [each["address"] for each in client.upstream("app")["servers"]] == [FIRST]


def test_upstreams_tell_what_is_left_to_nginx(house: House, client: Client) -> None:
    answer = requests.get(f"http://{house.api.address}/v1/upstreams", timeout=5).json()
    assert [upstream["name"] for upstream in answer["upstreams"]] == ["app", "named"]
    assert answer["unhooked"] == ["legacy"]
    assert answer["warnings"] == ["/etc/nginx/nginx.conf:3: odd"]
    assert client.upstream("named")["servers"][0]["weight"] == 2


def test_a_host_name_names_each_of_its_addresses_and_a_unix_path_keeps_its_slashes(client: Client) -> None:
    assert [each["address"] for each in client.servers("named", "web:80")] == ["web:80@10.0.0.1", "web:80@10.0.0.2"]
    assert [each["address"] for each in client.servers("named", "web:80@10.0.0.2")] == ["web:80@10.0.0.2"]
    assert server(client, "unix:/run/a b.sock", "named")["health"] == "up"


def test_a_drain_answers_when_nginx_serves_it_and_is_a_recorded_change(house: House, client: Client) -> None:
    house.plane.busy[FIRST] = 2
    answer = client.set_admin("app", FIRST, "drain")
    assert house.do(lambda: house.plane.revision) >= answer["revision"]
    drained = server(client, FIRST)
    assert (drained["admin"], drained["effective_weight"], drained["change"]) == ("drain", 0.0, answer["change"])
    assert client.change(answer["change"])["status"] == "running"
    house.plane.busy.clear()
    assert [record["status"] for record in client.follow_change(answer["change"])][-1] == "done"


def test_maint_and_ready_need_no_change(house: House, client: Client) -> None:
    assert client.set_admin("app", FIRST, "maint")["change"] is None
    assert server(client, FIRST)["admin"] == "maint"
    client.set_admin("app", FIRST, "ready")
    assert server(client, FIRST)["admin"] == "ready"


def test_a_wish_for_a_host_name_holds_for_each_of_its_addresses(client: Client) -> None:
    client.set_admin("named", "web:80", "drain", force=True)
    assert {each["admin"] for each in client.servers("named", "web:80")} == {"drain"}
    assert server(client, "unix:/run/a b.sock", "named")["admin"] == "ready"


def test_taking_the_last_server_away_is_refused_unless_forced(client: Client) -> None:
    client.set_admin("app", FIRST, "maint")
    client.set_admin("app", SECOND, "maint")
    assert refusal(client.set_admin, "app", THIRD, "drain") == (409, "guard")
    assert server(client, THIRD)["admin"] == "ready"
    client.set_admin("app", THIRD, "drain", force=True)
    assert server(client, THIRD)["admin"] == "drain"


def test_a_wish_that_nginx_cannot_be_told_yet_is_recorded_and_said_so(
    house: House, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.api.app.PUBLISH_SECONDS", 0.2)
    house.plane.error = "nginx's control socket does not answer"
    with pytest.raises(ApiError) as caught:
        client.set_admin("app", FIRST, "maint")
    assert (caught.value.status, caught.value.code) == (503, "not_published")
    assert "as soon as nginx answers" in caught.value.remedy
    house.plane.error = ""
    house.until(house.published)
    assert server(client, FIRST)["admin"] == "maint"


def test_a_table_that_nginx_refuses_is_said_wherever_somebody_asks(
    house: House, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.api.app.PUBLISH_SECONDS", 0.2)
    house.plane.refuses = "5000 servers, and there is room for 4096"
    with pytest.raises(ApiError, match="5000 servers") as caught:
        client.set_admin("app", FIRST, "maint")
    assert (caught.value.status, caught.value.code) == (503, "not_published")
    assert "as soon as nginx takes the table" in caught.value.remedy
    ready = requests.get(f"http://{house.api.address}/readyz", timeout=5)
    assert (ready.status_code, "5000 servers" in ready.json()["error"]["message"]) == (503, True)
    assert "headgate_plane_refuses 1.0" in requests.get(f"http://{house.api.address}/metrics", timeout=5).text
    house.plane.refuses = ""
    house.until(lambda: not house.runtime.problems())
    assert requests.get(f"http://{house.api.address}/readyz", timeout=5).status_code == 200


def test_requests_in_flight_are_read_now_and_for_the_table_that_is_asked_for(house: House, client: Client) -> None:
    house.plane.busy[FIRST] = 2
    revision = house.plane.revision
    assert client.in_flight("app", FIRST, revision, 0.05) == 2
    house.plane.busy.clear()
    assert client.in_flight("app", FIRST, revision, 5.0) == 0
    with pytest.raises(ApiError, match=f"nginx does not serve table {revision + 1} yet"):
        client.in_flight("app", FIRST, revision + 1, 0.0)


def test_what_does_not_exist_is_not_found(client: Client) -> None:
    assert refusal(client.upstream, "nope") == (404, "not_found")
    assert refusal(client.servers, "app", "nope") == (404, "not_found")
    assert refusal(client.set_admin, "app", "nope", "drain") == (404, "not_found")
    assert refusal(client.begin_change, "restart", "nope") == (404, "not_found")
    assert refusal(client.change, 99) == (404, "not_found")


def test_a_second_change_of_processes_is_busy(house: House, client: Client) -> None:
    house.do(house.processes.stuck.clear)
    first = client.begin_change("restart", "app", (FIRST,))
    assert refusal(client.begin_change, "restart", "app", (SECOND,)) == (409, "busy")
    house.do(house.processes.stuck.set)
    assert [record["status"] for record in client.follow_change(first)][-1] == "done"


def test_an_upstream_without_process_settings_cannot_be_restarted(client: Client) -> None:
    assert refusal(client.begin_change, "restart", "named", ("web:80",), force=True) == (422, "invalid")


def test_a_rollout_goes_in_batches_of_a_number_or_a_percentage_rounded_down(client: Client) -> None:
    for batch, expected in ((2, [0, 0, 1]), ("67%", [0, 0, 1]), ("50%", [0, 1, 2]), ("1%", [0, 1, 2])):
        change = client.begin_change("rollout", "app", batch=batch)
        record = list(client.follow_change(change))[-1]
        assert record["status"] == "done"
        batches = {step["server"]: step["batch"] for step in record["steps"]}
        assert [batches[key] for key in (FIRST, SECOND, THIRD)] == expected


def test_a_failed_change_says_why(house: House, client: Client) -> None:
    house.processes.broken = "gunicorn ended with 1: no module named app"
    change = client.begin_change("restart", "app", (FIRST,))
    record = list(client.follow_change(change))[-1]
    assert record["status"] == "failed"
    assert "no module named app" in record["error"]
    assert next(step for step in record["steps"] if step["name"] == "start")["state"] == "failed"


def test_a_long_poll_answers_at_the_next_step_and_not_before(house: House, client: Client) -> None:
    house.do(house.processes.stuck.clear)
    change = client.begin_change("restart", "app", (FIRST,))
    record = client.change(change)
    while not any(step["name"] == "exit" and step["state"] == "running" for step in record["steps"]):
        record = client.change(change, 10, record["version"])
    assert client.change(change, 0.2, record["version"]) == record, "nothing can have happened"
    threading.Timer(0.2, house.do, [house.processes.stuck.set]).start()
    later = client.change(change, 30, record["version"])
    assert later["version"] > record["version"]
    started = [step["started_at"] for step in later["steps"] if step["started_at"]]
    ended = [step["ended_at"] for step in later["steps"] if step["ended_at"]]
    assert later["version"] == len(started) + len(ended)
    assert list(client.follow_change(change))[-1]["status"] == "done"


def test_a_long_poll_of_an_ended_change_answers_at_once(client: Client) -> None:
    change = client.begin_change("restart", "app", (FIRST,))
    final = list(client.follow_change(change))[-1]
    assert client.change(change, 60, final["version"]) == final


def test_a_change_says_how_many_go_at_once_may_be_away_and_workers_it_is_to_reach(client: Client) -> None:
    number = client.begin_change("scale", "app", batch="70%", max_unavailable=1, workers=4)
    *_, record = client.follow_change(number)
    for shown in (record, client.changes()[0]):
        assert [shown[name] for name in ("batch", "max_unavailable", "workers")] == [2, 1, 4]
    *_, record = client.follow_change(client.begin_change("restart", "app", (FIRST,)))
    assert [record[name] for name in ("batch", "max_unavailable", "workers")] == [1, None, None]


def test_changes_are_listed_newest_first_in_pages(client: Client) -> None:
    for key in (FIRST, SECOND, THIRD):
        list(client.follow_change(client.begin_change("restart", "app", (key,))))
    assert [change["id"] for change in client.changes()] == [3, 2, 1]
    assert [change["id"] for change in client.changes(limit=1, before=3)] == [2]
    assert "steps" not in client.changes()[0]


def test_events_are_the_sentences_of_what_happened(client: Client) -> None:
    before = client.events()[-1]["id"]
    client.set_admin("app", FIRST, "maint")
    (event,) = client.events(after=before)
    assert event["id"] == before + 1
    assert (event["kind"], event["upstream"], event["server"]) == ("admin", "app", FIRST)
    assert FIRST in event["text"]
    assert client.events(limit=1) == [event]


def test_health_and_readiness_say_why_not(house: House) -> None:
    base = f"http://{house.api.address}"
    assert requests.get(f"{base}/healthz", timeout=5).json() == {"ok": True}
    assert requests.get(f"{base}/readyz", timeout=5).json() == {"ok": True}
    house.plane.error = "nginx's control socket does not answer"
    house.until(lambda: bool(house.runtime.state.plane.error))
    answer = requests.get(f"{base}/readyz", timeout=5)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert "control socket" in answer.json()["error"]["message"]
    assert requests.get(f"{base}/healthz", timeout=5).status_code == 200


def test_metrics_follow_the_state(house: House, client: Client) -> None:
    house.plane.busy[FIRST] = 3
    client.set_admin("app", FIRST, "drain")
    client.offline(SECOND)
    house.until(lambda: house.runtime.counters.upstreams["app"][FIRST].in_flight == 3)
    answer = requests.get(f"http://{house.api.address}/metrics", timeout=5)
    samples = {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["headgate_revision",] == samples["headgate_plane_revision",] == client.status()["revision"]
    assert samples["headgate_config_ok",] == samples["headgate_plane_up",] == 1
    assert samples["headgate_server_effective_weight", FIRST, "app"] == 0
    assert samples["headgate_server_effective_weight", SECOND, "app"] == 0
    assert samples["headgate_server_effective_weight", THIRD, "app"] == 1
    assert samples["headgate_server_quarantined", SECOND, "app"] == 1
    assert samples["headgate_server_quarantined", FIRST, "app"] == 0
    assert samples["headgate_server_ejected", FIRST, "app"] == 0
    assert samples["headgate_server_warm_up_held", FIRST, "app"] == 0
    assert samples["headgate_server_warm_up_queued", FIRST, "app"] == 0
    assert samples["headgate_server_admin", FIRST, "drain", "app"] == 1
    assert samples["headgate_server_admin", FIRST, "ready", "app"] == 0
    assert samples["headgate_server_in_flight", FIRST, "app"] == 3
    assert samples["headgate_server_requests_total", FIRST, "app"] == 100
    assert samples["headgate_server_answered_total", FIRST, "app"] == 98
    assert samples["headgate_server_errors_total", FIRST, "app"] == 4
    assert samples["headgate_server_failures_total", FIRST, "app"] == 2
    assert samples["headgate_server_timeouts_total", FIRST, "app"] == 1
    assert samples["headgate_server_response_seconds_total", FIRST, "app"] == 2.45
    assert samples["headgate_server_refused_marks_total", FIRST, "app"] == 3
    assert samples["headgate_server_health", FIRST, "up", "app"] == 1
    assert samples["headgate_changes", "running"] == 1


def test_a_store_that_cannot_be_written_refuses_wishes_and_nothing_changes(house: House, client: Client) -> None:
    house.refuse_writes()
    assert refusal(client.set_admin, "app", FIRST, "maint") == (507, "store_failed")
    assert server(client, FIRST)["admin"] == "ready"


def test_what_the_author_wants_under_headgates_own_parameters_goes_to_the_data_plane(
    house: House, client: Client
) -> None:
    wish = {"upstream": "app", "server": FIRST, "number": 0, "parameter": "weight", "value": "3"}
    gone = {"upstream": "app", "server": FIRST, "number": 1, "parameter": "down", "value": None}
    assert client.reread([wish, gone])["revision"] == client.status()["revision"]
    assert house.plane.meant == {("app", FIRST, 0, "weight"): "3", ("app", FIRST, 1, "down"): None}
    for bad in ({"value": "0"}, {"value": ""}, {"parameter": "down"}, {"value": "x"}, {"parameter": "backup"}):
        assert refusal(client.reread, [wish | bad]) == (422, "invalid"), bad
