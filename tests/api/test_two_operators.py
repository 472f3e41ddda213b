"""Several operators at once: of wishes that exclude each other exactly one is granted, and none is lost or doubled."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from controller.client import Client
from controller.errors import ApiError
from tests.support.house import APP, House

OPERATORS = 8
FIRST = APP.servers[0].key


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with House(tmp_path) as started:
        started.do(started.processes.stuck.clear)
        yield started
        started.do(started.processes.stuck.set)


def at_once(house: House, wish: Callable[[Client], object]) -> list[object]:
    """What each operator gets: the answer, or the error's code."""
    barrier = threading.Barrier(OPERATORS)

    def operator(_: int) -> object:
        client = Client(str(house.socket))
        barrier.wait(20)
        try:
            return wish(client)
        except ApiError as error:
            return error.code

    with ThreadPoolExecutor(OPERATORS) as pool:
        return list(pool.map(operator, range(OPERATORS)))


def test_of_many_who_begin_a_change_at_once_one_is_granted_and_the_others_are_told_why(house: House) -> None:
    answers = at_once(house, lambda client: client.begin_change("rollout", "app"))
    assert Counter(type(each) for each in answers) == {int: 1, str: OPERATORS - 1}
    assert set(answers) - {"busy"} == {1}
    client = Client(str(house.socket))
    assert [change["id"] for change in client.changes()] == [1]
    begun = [event["text"] for event in client.events() if event["kind"] == "change"]
    assert len(begun) == 1


def test_all_who_queue_at_once_are_granted_each_with_a_change_of_their_own(house: House) -> None:
    answers = at_once(house, lambda client: client.begin_change("restart", "app", (FIRST,), queue=True))
    assert sorted(map(str, answers)) == sorted(map(str, range(1, OPERATORS + 1)))
    client = Client(str(house.socket))
    statuses = Counter(change["status"] for change in client.changes())
    assert statuses == {"running": 1, "queued": OPERATORS - 1}
    house.do(house.processes.stuck.set)
    for number in range(1, OPERATORS + 1):
        *_, record = client.follow_change(number)
        assert record["status"] == "done", record["error"]


def test_of_many_who_steer_at_once_one_is_granted(house: House) -> None:
    client = Client(str(house.socket))
    number = client.begin_change("rollout", "app")
    assert Counter(at_once(house, lambda each: each.steer(number, "pause"))) == {"paused": 1, "busy": OPERATORS - 1}
    assert Counter(at_once(house, lambda each: each.steer(number, "resume"))) == {"running": 1, "busy": OPERATORS - 1}
    answers = Counter(at_once(house, lambda each: each.steer(number, "abort")))
    assert answers == {"aborting": 1, "busy": OPERATORS - 1}
    said = [event["text"] for event in client.events() if event["kind"] == "change"]
    assert len(said) == 4, said
    house.do(house.processes.stuck.set)
    *_, record = client.follow_change(number)
    assert record["status"] == "aborted"


def test_beginning_and_steering_at_once_leaves_one_change_that_is_paused_or_runs(house: House) -> None:
    def begin_then_pause(client: Client) -> object:
        return client.steer(client.begin_change("rollout", "app"), "pause")

    answers = Counter(at_once(house, begin_then_pause))
    assert answers == {"paused": 1, "busy": OPERATORS - 1}
    client = Client(str(house.socket))
    assert [(change["id"], change["status"]) for change in client.changes()] == [(1, "paused")]
