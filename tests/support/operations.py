"""Operations by the command on a stage, each under mixed load of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from controller.demo.stage import UPSTREAM, Stage, until

# The end of the stage's [upstream.app.process]: the commands write down that they ran, and fail where a file says so.
DEPLOY = """
deploy = ["sh", "-c", "echo deploy {port} >> deployed; test ! -e broken-{port}"]
roll_back = ["sh", "-c", "echo back {port} >> deployed; rm -f broken-{port}"]
deploy_timeout = "10s"
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """The `record` of the change that a command made, the `summary` of the load meanwhile, what the command `said`,
    and of each server whether it `serves` afterwards."""

    record: Mapping[str, Any]
    summary: Mapping[str, Any]
    said: str
    serves: tuple[bool, ...]


def under_load(stage: Stage, *words: str, rate: float = 60.0) -> Ran:
    """Run this command to its end while requests come, from before it begins until after it has ended."""
    load, log = stage.load(rate), stage.prefix / "load.log"
    until(lambda: bool(load.read() or load.ticks), "traffic", 20, log)
    done = subprocess.run(
        [sys.executable, "-m", "controller", "--config", str(stage.settings), *words],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    until(lambda: bool(load.read()) and load.ticks[-1]["requests"] > 100, "traffic", 20, log)
    summary = load.finish()
    record = stage.client.change(stage.client.changes()[0]["id"])
    said = done.stdout + done.stderr
    assert done.returncode == (record["status"] != "done"), said
    serves = tuple(server["effective_weight"] > 0 for server in stage.client.upstream(UPSTREAM)["servers"])
    return Ran(record, summary, said, serves)
