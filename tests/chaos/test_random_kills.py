"""The daemon is killed with -9 at random times and in random steps, under load, while one change follows another: each
ends as was wished, no request fails, and no process is left over.

The seed is printed; HEADGATE_SEED repeats its dice (the machine's timing has dice of its own), and HEADGATE_KILLS says
how often the daemon is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from controller.demo.stage import UPSTREAM, Load, Stage, tail, until
from controller.demo.sweep import MARK, members
from controller.errors import ApiError, DaemonUnreachable
from tests.chaos import dying_daemon
from tests.chaos.test_killed_daemon import MOMENTS, answers, masters

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("HEADGATE_KILLS", "200"))
SEED = int(os.environ.get("HEADGATE_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
EARLY, START = 0.15, 0.8  # the share of the daemons that die within so many seconds of their start
DOOMED, REACH = 0.5, 2.5  # the share that die in a step chosen before, which may take so many seconds to come
LIFE = 1.0  # seconds that the others live at most once they answer
ABORTED = 0.08  # how often a change under way is aborted in a life

#: kind: how often, with how many servers at once, and the steps of it that may be left out
KINDS: dict[str, tuple[int, tuple[int, ...], set[str]]] = {
    "rollout": (4, (1, 2), {"kill"}),
    "restart": (2, (1, 2), {"kill"}),
    "deploy": (2, (1, 2), {"kill"}),
    "upgrade": (2, (1, 2), {"kill"}),
    "reload": (2, (1, 2), set()),
    "scale": (2, (1, 2), {"drain", "empty", "settle"}),  # to more workers
}
NEW_MASTER = {"rollout", "restart", "deploy", "upgrade"}
SETTINGS = """
deploy = ["sh", "-c", "sleep 0.2; echo {port} >> deployed"]

[defaults.rollout]
max_load = 0
"""


@dataclass
class Wished:
    """A change that was wished. `number` is 0, and `aborted` None, while no daemon has lived to answer for it."""

    kind: str
    servers: tuple[str, ...]
    before: dict[str, int | None]
    number: int = 0
    aborted: bool | None = False


# A daemon of this test is a fork of a process that has everything loaded: most of a daemon's start is that.
_NURSERY = multiprocessing.get_context("forkserver")
_NURSERY.set_forkserver_preload(["tests.chaos.dying_daemon"])


def be_daemon(prefix: str, moment: str, step: str, server: str) -> None:
    """What a forked process does: be the stage's daemon, and die as chosen."""
    os.setsid()
    os.chdir(prefix)
    os.environ.update({MARK: prefix, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"})
    log = os.open("headgate.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.exit(dying_daemon.main(f"{prefix}/headgate.toml", moment, step, server))


class Chaos:
    """Wishes changes, kills daemons, and judges what became of the changes."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.dice = random.Random(SEED)
        self.ended: Counter[str] = Counter()
        self.interrupted: Counter[str] = Counter()
        self._wished: Wished | None = None
        self._last = 0
        self._open: list[dict[str, Any]] = []  # steps of the change under way that had not ended

    def life(self) -> None:
        """One life of a daemon, from its start to its death."""
        doomed = bool(self._open) and self.dice.random() < DOOMED
        self.daemon = self._begun(doomed)
        if not doomed and self.dice.random() < EARLY:
            self._kill(self.dice.uniform(0, START))
            return
        with contextlib.suppress(DaemonUnreachable):
            while self.daemon.is_alive() and not answers(self.stage):
                time.sleep(0.02)
            if self.under_way() is None:
                self._begin()
            elif self.dice.random() < ABORTED:
                self._abort()
        self._kill(REACH if doomed else self.dice.uniform(0, LIFE))

    def _begun(self, doomed: bool) -> BaseProcess:
        """A daemon, perhaps one that is doomed to die in a step of the change under way."""
        doom = ("", "", "")
        if doomed:
            step = self.dice.choice(self._open[:4])
            doom = (self.dice.choice(MOMENTS), step["name"], step["server"])
        daemon = _NURSERY.Process(target=be_daemon, args=(str(self.stage.prefix), *doom), daemon=True)
        daemon.start()
        return daemon

    def _kill(self, seconds: float) -> None:
        """End it after so many seconds, if it has not ended itself by then."""
        self.daemon.join(seconds)
        self.daemon.kill()
        self.daemon.join(20)
        log = self.stage.prefix / "headgate.log"
        assert self.daemon.exitcode == -signal.SIGKILL, f"it has ended in another way: {tail(log)}"

    def under_way(self) -> dict[str, Any] | None:
        """The change under way, None where there is none; one that has ended is judged. DaemonUnreachable."""
        newest = next(iter(self.stage.client.changes(limit=1)), {"id": 0})["id"]
        if self._wished and not self._wished.number and newest == self._last:
            self._wished = None  # the daemon had died before it was recorded
        if self._wished is None:
            assert newest == self._last, "no change comes by itself"
            return None
        assert newest == (self._wished.number or self._last + 1), "no change is lost"
        self._wished.number = newest
        record = self.stage.client.change(newest)
        self._open = [step for step in record["steps"] if step["state"] in ("pending", "running")]
        if record["status"] in ("running", "aborting"):
            self.interrupted.update(step["name"] for step in self._open if step["state"] == "running")
            return record
        self._judge(self._wished, record)
        self._last, self._wished = newest, None
        return None

    def _begin(self) -> None:
        servers = self.stage.client.upstream(UPSTREAM)["servers"]
        if any((s["admin"], s["health"], s["effective_weight"]) != ("ready", "up", s["weight"]) for s in servers):
            return
        kind = self.dice.choices(list(KINDS), [often for often, _, _ in KINDS.values()])[0]
        chosen = tuple(self.dice.sample(self.stage.addresses, self.dice.choice((1, 2, 3))))
        batch, workers = self.dice.choice(KINDS[kind][1]), self.dice.choice((1, 2, 3)) if kind == "scale" else 0
        self._wished = Wished(kind, chosen, {address: self.stage.master(address) for address in self.stage.addresses})
        self._wished.number = self.stage.client.begin_change(kind, UPSTREAM, chosen, batch, workers=workers)

    def _abort(self) -> None:
        assert self._wished is not None
        if self._wished.aborted:
            return
        self._wished.aborted = None
        try:
            self.stage.client.steer(self._wished.number, "abort")
            self._wished.aborted = True
        except ApiError:  # it has ended, or an abort that nobody answered for has come through
            self._wished.aborted = self.stage.client.change(self._wished.number)["status"] in ("aborting", "aborted")

    def _judge(self, wished: Wished, record: dict[str, Any]) -> None:
        self.ended[f"{record['kind']} {record['status']}"] += 1
        fit = {True: ("aborted",), False: ("done",), None: ("aborted", "done")}[wished.aborted]
        assert record["status"] in fit, record
        if record["status"] == "done":
            left_out = {step["name"] for step in record["steps"] if step["state"] != "done"}
            assert left_out <= KINDS[wished.kind][2], record
        for address in self.stage.addresses:
            # A new master takes over the old one's pid file within a second.
            self._see(lambda a=address: masters(self.stage, a) == [self.stage.master(a)], f"one master at {address}")
            if address not in wished.servers or wished.kind not in NEW_MASTER:
                assert self.stage.master(address) == wished.before[address], record
            elif record["status"] == "done":
                assert self.stage.master(address) != wished.before[address], record

    def _see(self, what: Callable[[], bool], name: str) -> None:
        until(what, name, 20, self.stage.prefix / "headgate.log")


def strays(stage: Stage, load: Load) -> list[list[str]]:
    """The command lines of the stage's processes that belong to none of its servers, to nginx, to load or daemon."""
    roots = {stage.daemon.pid, stage.nginx.pid, load.pid, *(stage.master(address) for address in stage.addresses)}
    found = []
    for process in members(stage.prefix):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not roots & {process.pid, *(parent.pid for parent in process.parents())}:
                found.append(process.cmdline())
    return found


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_changes_whose_daemon_is_killed_at_random_end_as_was_wished() -> None:
    print(f"seed {SEED}: HEADGATE_SEED={SEED} repeats these dice")
    with Stage("gthread", warm_up=0.3, settings=SETTINGS) as stage:
        text = stage.settings.read_text()
        # Short, and patient with a machine on which daemons are started all the time.
        changes = {'settle = "1s"': 'settle = "100ms"', "rise = 2": "rise = 1", "fall = 3": "fall = 10"}
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        stage.settings.write_text(text)
        (stage.prefix / "gunicorn.conf.py").write_text("")  # else a master waits for the daemon before it ends
        workers = stage.nginx_workers()
        stage.stop_daemon()
        load = stage.load(25, "--mix", "fast=9,echo=1")
        chaos = Chaos(stage)
        for _ in range(KILLS):
            chaos.life()
        stage.start_daemon()
        until(lambda: chaos.under_way() is None, "the last change", 120, stage.prefix / "headgate.log")
        print(f"ended: {dict(chaos.ended)}")
        print(f"interrupted: {dict(chaos.interrupted)}")
        assert strays(stage, load) == []
        summary = load.finish()
        assert summary["failures"] == {}, summary
        assert summary["requests"] > 5 * KILLS
        assert sum(chaos.ended.values()) >= KILLS / 20
        assert stage.nginx_workers() == workers, "nginx was not reloaded"
