"""Notices over the API: offline, online and warm-up, with a real runtime behind; what they answer, and what happens."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from controller.api.app import MAX_BODY
from controller.client import Client
from controller.core.model import Server, Upstream
from controller.core.policy import NoticePolicy, WarmUpPolicy
from tests.adapters.test_notice import OK, answers, consumer
from tests.support.house import APP, NAMED, POLICY, House

FIRST, SECOND, THIRD = (server.key for server in APP.servers)
TOKEN = "a-long-random-word"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with House(tmp_path, listen="127.0.0.1:0", token=TOKEN) as started:
        yield started


@pytest.fixture
def client(house: House) -> Client:
    return Client(str(house.socket))


def post(house: House, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    data = body if isinstance(body, bytes) else json.dumps(body)
    answer = requests.post(f"http://{house.api.address}{path}", data=data, headers=headers, timeout=20)
    return answer.status_code, answer.json()


def offline(house: House, server: str = FIRST, **more: Any) -> dict[str, Any]:
    status, answer = post(house, "/v1/offline", {"server": server, **more})
    assert status == 200, answer
    return answer


def refusal(house: House, path: str, body: Any) -> tuple[int, str]:
    status, answer = post(house, path, body)
    assert list(answer) == ["error"]
    assert answer["error"]["message"]
    assert answer["error"]["remedy"]
    return status, answer["error"]["code"]


def quarantine(client: Client, server: str = FIRST, upstream: str = "app") -> list[dict[str, Any]]:
    ((found),) = client.servers(upstream, server)
    entries: list[dict[str, Any]] = found["quarantine"]
    return entries


def test_an_offline_notice_answers_when_nginx_sends_the_server_nothing_more(house: House, client: Client) -> None:
    answer = offline(house, id="n-1", why="it is\nstopped")
    assert answer == {
        "revision": house.plane.revision,
        "servers": [{"upstream": "app", "server": FIRST, "in_flight": 0}],
        "refused": [],
        "replayed": False,
        "drained": True,
    }
    ((entry),) = quarantine(client)
    assert (entry["kind"], entry["why"]) == ("notice", "it is stopped")
    assert 100 < entry["remaining"] <= 120
    assert client.servers("app", FIRST)[0]["effective_weight"] == 0


def test_without_waiting_requests_in_flight_are_told_and_it_is_not_drained(house: House) -> None:
    house.plane.busy[FIRST] = 2
    answer = offline(house)
    assert (answer["servers"][0]["in_flight"], answer["drained"]) == (2, False)


def test_waiting_ends_when_the_last_request_has(house: House) -> None:
    house.plane.busy[FIRST] = 2
    house.plane.asked.clear()
    done: list[dict[str, Any]] = []
    waiting = threading.Thread(target=lambda: done.append(offline(house, wait=60)))
    waiting.start()
    assert house.plane.asked.wait(20), "it looks at nginx's counters"
    assert not done
    house.plane.busy.clear()
    waiting.join(20)
    assert (done[0]["servers"][0]["in_flight"], done[0]["drained"]) == (0, True)


def test_waiting_ends_at_its_time_too(house: House) -> None:
    house.plane.busy[FIRST] = 1
    answer = offline(house, wait=0.2)
    assert (answer["servers"][0]["in_flight"], answer["drained"]) == (1, False)


def test_waiting_ends_when_the_daemon_does(tmp_path: Path) -> None:
    done: list[dict[str, Any]] = []
    with House(tmp_path, listen="127.0.0.1:0", token=TOKEN) as house:
        house.plane.busy[FIRST] = 1
        house.plane.asked.clear()
        waiting = threading.Thread(target=lambda: done.append(offline(house, wait=600)))
        waiting.start()
        assert house.plane.asked.wait(20)
    waiting.join(20)
    assert done[0]["drained"] is False


def test_a_notice_that_comes_again_is_acknowledged_without_effect_and_still_waits(house: House, client: Client) -> None:
    offline(house, id="n-1")
    assert post(house, "/v1/online", {"server": FIRST})[0] == 200
    house.plane.busy[FIRST] = 1
    revision = client.status()["revision"]
    answer = offline(house, id="n-1")
    assert (answer["replayed"], answer["drained"]) == (True, False)
    assert answer["servers"] == [{"upstream": "app", "server": FIRST, "in_flight": 1}]
    assert quarantine(client) == []
    assert client.status()["revision"] == revision


def test_the_time_of_a_quarantine_can_be_named(house: House, client: Client) -> None:
    offline(house, seconds=7)
    assert 0 < quarantine(client)[0]["remaining"] <= 7


def test_without_an_upstream_every_one_that_has_the_server_hears_of_it(house: House, client: Client) -> None:
    other = Upstream("other", (APP.servers[0], Server("web:81", "web:81", "10.0.0.1", 81)), policy=POLICY)
    house.source.config = replace(house.source.config, upstreams=(APP, NAMED, other))
    client.reread()
    house.until(house.settled)
    assert {each["upstream"] for each in offline(house)["servers"]} == {"app", "other"}
    assert post(house, "/v1/online", {"server": FIRST})[0] == 200
    assert {each["upstream"] for each in offline(house, upstream="other")["servers"]} == {"other"}
    assert quarantine(client) == []


def test_where_it_is_the_last_one_it_stays_and_the_answer_says_so(house: House, client: Client) -> None:
    lone = Upstream("lone", (APP.servers[0],), policy=POLICY)
    house.source.config = replace(house.source.config, upstreams=(APP, lone))
    client.reread()
    house.until(house.settled)
    answer = offline(house)
    assert [each["upstream"] for each in answer["servers"]] == ["app"]
    assert answer["refused"] == [f"{FIRST}: no other server of lone serves"]
    assert answer["drained"] is False
    assert refusal(house, "/v1/offline", {"server": FIRST, "upstream": "lone"}) == (409, "guard")


def test_a_backend_may_call_itself_by_ip_address_and_port(house: House, client: Client) -> None:
    assert offline(house, "10.0.0.2:80")["servers"][0]["server"] == "web:80@10.0.0.2"
    assert post(house, "/v1/online", {"server": "10.0.0.2:80", "upstream": "named"})[0] == 200
    assert quarantine(client, "web:80@10.0.0.2", "named") == []
    assert offline(house, "unix:/run/a b.sock")["servers"][0]["upstream"] == "named"


def test_an_online_notice_ends_the_quarantine_and_answers_when_nginx_serves_it(house: House, client: Client) -> None:
    offline(house)
    status, answer = post(house, "/v1/online", {"server": FIRST})
    assert (status, list(answer)) == (200, ["revision"])
    house.until(house.settled)
    assert quarantine(client) == []
    assert client.servers("app", FIRST)[0]["effective_weight"] == 1


def test_bad_notices_are_refused_in_the_one_shape(house: House) -> None:
    for path in ("/v1/offline", "/v1/online"):
        assert refusal(house, path, {"server": "10.9.9.9:1"}) == (404, "not_found")
        assert refusal(house, path, {"server": FIRST, "upstream": "nope"}) == (404, "not_found")
        assert refusal(house, path, {"server": FIRST, "colour": "red"}) == (422, "invalid")
        assert refusal(house, path, {}) == (422, "invalid")
        assert refusal(house, path, b"not json") == (422, "invalid")
        assert refusal(house, path, b'"' + b"x" * MAX_BODY + b'"') == (413, "too_large")
    for wrong in ({"seconds": 0}, {"seconds": "7"}, {"wait": 601}, {"wait": -1}, {"id": "x" * 201}, {"why": None}):
        assert refusal(house, "/v1/offline", {"server": FIRST, **wrong}) == (422, "invalid")
    house.do(house.settled)


def test_a_body_without_a_length_is_bounded_as_well(house: House) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(MAX_BODY // 1000 + 2):
            yield b" " * 1000

    answer = requests.post(
        f"http://{house.api.address}/v1/online",
        data=endless(),
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=20,
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_a_notice_that_nginx_cannot_be_told_is_recorded_and_said_so(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.api.app.PUBLISH_SECONDS", 0.2)
    house.plane.error = "nginx's control socket does not answer"
    assert refusal(house, "/v1/offline", {"server": FIRST}) == (503, "not_published")
    assert house.do(lambda: house.runtime.state.groups["app"].peers[FIRST].quarantine)


def test_a_warm_up_by_hand_answers_when_nginx_follows_it(house: House, client: Client) -> None:
    warming = replace(POLICY, warm_up=WarmUpPolicy(duration=600, starts="healthy", floor=0.25))
    house.source.config = replace(house.source.config, upstreams=(replace(APP, policy=warming), NAMED))
    client.reread()
    assert client.warm_up("app", FIRST) == {"revision": house.plane.revision}
    ((found),) = client.servers("app", FIRST)
    assert (found["warm_up"]["phase"], found["effective_weight"]) == ("running", 0.25)


def test_a_warm_up_that_cannot_be_is_refused(house: House) -> None:
    assert refusal(house, f"/v1/upstreams/app/servers/{FIRST}/warm-up", b"") == (422, "invalid")
    assert refusal(house, "/v1/upstreams/app/servers/nope/warm-up", b"") == (404, "not_found")
    assert refusal(house, f"/v1/upstreams/nope/servers/{FIRST}/warm-up", b"") == (404, "not_found")


async def test_consumers_hear_of_a_restart_once_nginx_sends_the_server_nothing_more(tmp_path: Path) -> None:
    import asyncio

    async with consumer(answers(OK)) as told:
        with House(tmp_path) as house:
            policy = replace(POLICY, notices=NoticePolicy(True, (told.url, "http://127.0.0.1:1/"), tries=1))
            config = replace(house.source.config, upstreams=(replace(APP, policy=policy),))
            house.source.config = config
            client = Client(str(house.socket))

            def restart() -> dict[str, Any]:
                client.reread()
                return list(client.follow_change(client.begin_change("restart", "app", (FIRST,))))[-1]

            record = await asyncio.to_thread(restart)
    assert record["status"] == "done"
    (step,) = [each for each in record["steps"] if each["name"] == "notify"]
    assert step["detail"] == "1 of 2 consumers acknowledged; http://127.0.0.1:1/: refused after 1 try"
    ((_, body),) = told.told
    assert (body["event"], body["server"], body["port"]) == ("offline", FIRST, 8001)


async def test_consumers_hear_of_an_offline_notice_and_of_a_drain_by_hand_once_each(tmp_path: Path) -> None:
    import asyncio

    async with consumer(answers(OK)) as told:
        with House(tmp_path) as house:
            policy = replace(POLICY, process=None, notices=NoticePolicy(True, (told.url,), tries=1))
            house.source.config = replace(house.source.config, upstreams=(replace(APP, policy=policy),))
            client = Client(str(house.socket))

            def leave() -> dict[str, Any]:
                client.reread()
                for _ in range(2):
                    client.offline(FIRST, id="deploy-7")
                heard = next(event for event in client.follow_events(0) if event["kind"] == "notice")
                assert heard["text"] == f"app: told that {FIRST} goes offline: 1 of 1 consumers acknowledged"
                return list(client.follow_change(client.begin_change("drain", "app", (SECOND,), force=True)))[-1]

            record = await asyncio.to_thread(leave)
    assert [(step["name"], step["state"]) for step in record["steps"]] == [
        ("drain", "done"),
        ("notify", "done"),
        ("empty", "done"),
    ]
    assert [body["server"] for _, body in told.told] == [FIRST, SECOND]
