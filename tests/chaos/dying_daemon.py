"""The real daemon, which ends itself by SIGKILL at a chosen moment of a chosen step of a change.

    python -m tests.chaos.dying_daemon SETTINGS MOMENT STEP SERVER

MOMENT: `begun`, when the step's beginning has been recorded and nothing of it done; `during`, a fraction of a second
later; `ended`, when it has been done and its end is not yet recorded.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from controller import daemon
from controller.adapters.store.sqlite import SqliteStore
from controller.core.model import StepState
from controller.ports import Delta, EventRecord

DURING = 0.15  # seconds


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingStore(SqliteStore):
    moment, step, server = "", "", ""

    async def save(self, delta: Delta) -> tuple[EventRecord, ...]:
        if self.moment == "ended" and self._reached(delta, StepState.DONE, StepState.SKIPPED):
            die()
        records = await super().save(delta)
        if self._reached(delta, StepState.RUNNING):
            if self.moment == "begun":
                die()
            if self.moment == "during":
                asyncio.get_running_loop().call_later(DURING, die)
        return records

    def _reached(self, delta: Delta, *states: StepState) -> bool:
        return any(
            step.name == self.step and step.server == self.server and step.state in states
            for change in delta.changes.values()
            for step in change.steps
        )


def main(path: str, moment: str, step: str, server: str) -> int:
    DyingStore.moment, DyingStore.step, DyingStore.server = moment, step, server
    daemon.SqliteStore = DyingStore  # type: ignore[misc]
    return daemon.run(path)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
