"""The whole demo as a user runs it: what it prints, how it ends, and that nothing is left of it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from controller.demo.stage import StageError, find_nginx, until
from controller.demo.sweep import members, sweep

try:
    find_nginx()
except StageError as error:
    pytest.skip(str(error), allow_module_level=True)


@dataclass
class Show:
    process: subprocess.Popen[bytes]
    home: Path
    said: Path

    def prefix(self) -> Path | None:
        return next(self.home.iterdir(), None)

    def runs(self) -> bool:
        """Whether all of its parts run: watchdog and load aside, three masters with workers, nginx, the daemon."""
        assert self.process.poll() is None, self.said.read_text()
        prefix = self.prefix()
        return prefix is not None and (prefix / "api.sock").exists() and len(members(prefix)) >= 13


@pytest.fixture
def show(tmp_path: Path) -> Iterator[Show]:
    with tempfile.TemporaryDirectory(prefix="demo-", dir="/tmp") as home:
        environment = {**os.environ, "TMPDIR": home, "ONCE": "1"}
        with (tmp_path / "said").open("wb") as said:
            command = [sys.executable, "-m", "controller", "demo", "--once"]
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        show = Show(process, Path(home), tmp_path / "said")
        try:
            yield show
        finally:
            process.kill()
            process.wait()
            for prefix in Path(home).iterdir():
                sweep(prefix, patience=1.0)


@pytest.mark.timeout(180)
def test_the_demo_loses_no_request_and_leaves_nothing(show: Show) -> None:
    until(show.runs, "the stage", 60, show.said)
    prefix = show.prefix()
    assert prefix is not None
    assert show.process.wait(120) == 0, show.said.read_text()
    assert (members(prefix), list(show.home.iterdir())) == ([], [])
    said = show.said.read_text()
    assert "\n  0 failed requests of " in said
    assert "rollout of app: done" in said
    assert "nginx: 0 reloads" in said
    assert said.count("warm done") == 3
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGHUP, 130), (signal.SIGKILL, -9)]
)
def test_whatever_ends_the_demo_nothing_is_left_of_it(show: Show, number: signal.Signals, status: int) -> None:
    until(show.runs, "the stage", 60, show.said)
    prefix = show.prefix()
    assert prefix is not None
    show.process.send_signal(number)
    assert show.process.wait(30) == status
    if number is signal.SIGKILL:
        until(lambda: not prefix.exists(), "the watchdog to sweep", 30, show.said)
    assert (members(prefix), list(show.home.iterdir())) == ([], [])
