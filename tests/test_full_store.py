"""A store that cannot be written while a change is under way: no step runs that is not recorded, and then all do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.client import Client
from controller.core.model import Health, StepName, StepState
from controller.errors import ApiError
from tests.support.house import House

FIRST, SECOND = "127.0.0.1:8001", "127.0.0.1:8002"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with House(tmp_path) as started:
        yield started


def state(house: House, change: int, name: StepName) -> StepState:
    return next(s.state for s in house.runtime.state.changes[change].steps if s.name is name)


def test_a_change_waits_before_its_next_step_and_goes_on_when_the_disk_is_free_again(house: House) -> None:
    client = Client(str(house.socket))
    house.do(house.processes.stuck.clear)
    change = client.begin_change("restart", "app", (FIRST,))
    house.until(lambda: state(house, change, StepName.EXIT) is StepState.RUNNING)
    house.refuse_writes()
    house.do(house.processes.stuck.set)
    house.until(lambda: state(house, change, StepName.START) is StepState.RUNNING)

    # Probes and tables go on meanwhile, turn after turn.
    for down, health in (({SECOND}, Health.DOWN), (set[str](), Health.UP)):
        house.do(lambda down=down: (setattr(house.prober, "down", down), house.prober.probe_now("app", SECOND)))
        house.until(lambda health=health: house.runtime.state.groups["app"].peers[SECOND].health is health)
        house.until(house.published)
    with pytest.raises(ApiError) as refused:
        client.set_admin("app", SECOND, "drain")
    assert refused.value.code == "store_failed"
    assert any("state.db" in problem for problem in house.runtime.problems())
    assert house.processes.started == [], "the step was not recorded, so it is not begun"

    house.refuse_writes(False)
    house.until(lambda: house.runtime.state.changes[change].status.ended)
    assert client.change(change)["status"] == "done"
    assert house.processes.started == [FIRST]
    assert house.runtime.problems() == []
