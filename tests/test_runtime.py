"""What the runtime records beside what happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller import runtime
from controller.client import Client
from tests.support.house import APP, House


def test_while_a_step_is_under_way_it_is_recorded_again_and_again_that_somebody_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "FLUSH", 0.1)
    with House(tmp_path) as house:
        house.do(house.processes.stuck.clear)
        Client(str(house.socket)).begin_change("restart", "app", (APP.servers[0].key,))
        house.until(
            lambda: any(s.name == "exit" and s.state == "running" for s in house.runtime.state.changes[1].steps)
        )

        async def recorded_again() -> None:
            first = (await house.runtime.store.load()).now
            while (await house.runtime.store.load()).now < first + 0.3:
                await house.runtime.changed(house.runtime.version, 0.05)

        house.call(recorded_again())
        house.do(house.processes.stuck.set)
