"""The wall clock of the host jumps by an hour, under nginx, the daemon and the application: nothing that lasts a while
is cut short or goes on for ever, and no request is lost."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from controller.demo.stage import UPSTREAM, Stage, until

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
HOUR = 3600
WARM_UP = 4.0
QUARANTINE = 5.0


class Deceived(Stage):
    """A stage whose nginx and daemon take the wall clock from a file."""

    def spawn(self, command: Sequence[str], log: Path, **options: Any) -> subprocess.Popen[bytes]:
        if command[0].endswith("nginx") or command[-1] == "run":
            options["environment"] = {
                **options.get("environment", {}),
                "LD_PRELOAD": str(LIBRARY),
                "FAKETIME_TIMESTAMP_FILE": str(self.prefix / "offset"),
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "DONT_FAKE_MONOTONIC": "1",  # its name in older releases
                # Not for what the daemon starts: libfaketime's clock_nanosleep() refuses Python's time.sleep().
                f"HEADGATE_UPSTREAM__{UPSTREAM.upper()}__PROCESS__ENVIRONMENT": (
                    '{ APP_SERVER = "{address}", LD_PRELOAD = "" }'
                ),
            }
            self.jump(0)
        return super().spawn(command, log, **options)

    def jump(self, offset: int) -> None:
        """Put the clock off by so many seconds from what it is."""
        (self.prefix / "offset").write_text(f"{offset:+d}")


@pytest.fixture(scope="module")
def stage() -> Iterator[Deceived]:
    if LIBRARY is None:
        pytest.skip("needs libfaketime: apt install faketime")
    with Deceived("gthread", warm_up=WARM_UP) as built:
        yield built


def step(record: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in record["steps"] if each["name"] == name)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [HOUR, -HOUR])
def test_a_jump_of_the_clock_changes_no_warm_up_and_loses_no_request(stage: Deceived, offset: int) -> None:
    log = stage.prefix / "headgate.log"
    load = stage.load(80, "--mix", "fast=9,echo=1")
    until(lambda: bool(load.read() and load.ticks), "traffic", 20, log)
    change = stage.client.begin_change("restart", UPSTREAM, [stage.addresses[0]])
    until(lambda: step(stage.client.change(change), "warm")["state"] == "running", "the warm-up", 60, log)
    began = time.monotonic()
    stage.jump(offset)
    until(lambda: stage.client.change(change)["status"] != "running", "the end of the restart", 60, log)
    record = stage.client.change(change)
    stage.jump(0)

    assert record["status"] == "done"
    assert time.monotonic() - began > WARM_UP / 2, "the warm-up was cut short"
    warm = step(record, "warm")
    assert abs(warm["ended_at"] - warm["started_at"] - offset) < 60, "the daemon's own clock has jumped"
    summary = load.finish()
    assert (summary["failures"], summary["requests"] > 100) == ({}, True)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [HOUR, -HOUR])
def test_a_jump_of_the_clock_neither_ends_nor_prolongs_a_quarantine(stage: Deceived, offset: int) -> None:
    log, address = stage.prefix / "headgate.log", stage.addresses[0]

    def quarantines() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = stage.client.servers(UPSTREAM, address)[0]["quarantine"]
        return found

    def all_serve() -> bool:
        return all(each["effective_weight"] > 0 for each in stage.client.upstream(UPSTREAM)["servers"])

    until(all_serve, "all servers serve", 60, log)
    began = time.monotonic()
    stage.client.offline(address, seconds=QUARANTINE, why="it stops")
    stage.jump(offset)
    assert [each["why"] for each in quarantines() if each["remaining"] <= QUARANTINE] == ["it stops"]
    until(lambda: not quarantines(), "the end of the quarantine", QUARANTINE + 30, log)
    assert time.monotonic() - began >= QUARANTINE, "it ended early"
    stage.jump(0)
    until(all_serve, "all servers serve", 60, log)
