"""A backend that is killed, one that hangs, and one that flaps, under load: what it costs the clients.

The same gunicorn servers behind Headgate's nginx and behind HAProxy (health checks, `observe layer7`, retries).

    python -m tests.bench.faults [kill] [hang] [flap]
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from controller.demo.stage import UPSTREAM, Load, Stage, until
from tests.bench.haproxy import HAProxy, haproxy

RATE = 200
AFTER = 2000  # requests that follow the fault
CHECK = "interval = '500ms'\ntimeout = '400ms'\npath = '/healthz'\nrise = 2\nfall = 2\n"
SETTINGS = f"[upstream.{UPSTREAM}.check]\n{CHECK}\n[upstream.{UPSTREAM}.outlier]\nerrors = 3\ntimeouts = 3\n"
BACKEND = """\
  balance roundrobin
  retries 3
  option redispatch 1
  retry-on conn-failure empty-response response-timeout
  option httpchk GET /healthz
  timeout check 400ms
  default-server check inter 500ms rise 2 fall 2 observe layer7 error-limit 3 on-error mark-down
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a fault cost behind one balancer: requests failed of all, how many were at the server just then (as far as
    the balancer tells), and the seconds that the slowest right answer took."""

    balancer: str
    failed: int
    requests: int
    inside: int
    slowest: float


@dataclass(frozen=True, slots=True)
class Changes:
    """How often a server that flaps `swings` times changed its state."""

    swings: int
    headgate: int
    haproxy: int


@contextmanager
def _peer(stage: Stage) -> Iterator[HAProxy]:
    lines = "\n".join(f"  server s{at} {address}" for at, address in enumerate(stage.addresses))
    with haproxy(BACKEND + lines, "timeout connect 1s\n  timeout server 2s") as proxy:
        yield proxy


def _family(stage: Stage, address: str) -> list[psutil.Process]:
    """A server's master and workers."""
    pid = stage.master(address)
    assert pid is not None
    master = psutil.Process(pid)
    return [master, *master.children(recursive=True)]


def _signal(stage: Stage, address: str, number: signal.Signals) -> None:
    for process in _family(stage, address):
        process.send_signal(number)


def _requests(load: Load) -> int:
    load.read()
    return int(load.ticks[-1]["requests"]) if load.ticks else 0


def _in_flight(stage: Stage, address: str) -> int:
    (upstream,) = stage.client.status()["upstreams"]
    return int(next(s["in_flight"] for s in upstream["servers"] if s["address"] == address))


def strike(fault: signal.Signals) -> list[Cost]:
    """Send `fault` to all processes of one of three servers under GET requests; Headgate's cost and HAProxy's."""
    costs = []
    for balancer in ("headgate", "haproxy"):
        with Stage("gthread", warm_up=0, settings=SETTINGS, failover=True) as stage, _peer(stage) as proxy:
            if balancer == "haproxy":
                stage.url = proxy.url
            load = Load(stage, ["--rate", str(RATE), "--mix", "fast=1", "--interval", "0.2"])
            log = stage.prefix / "load.log"
            until(lambda load=load: _requests(load) > RATE, "traffic", 30, log)  # type: ignore[misc]
            inside = _in_flight(stage, stage.addresses[0]) if balancer == "headgate" else 0
            _signal(stage, stage.addresses[0], fault)
            enough = _requests(load) + AFTER
            until(lambda load=load, enough=enough: _requests(load) > enough, "traffic", 60, log)  # type: ignore[misc]
            summary = load.finish()
            slowest = summary["kinds"]["fast"]["max"]
            costs.append(Cost(balancer, summary["failed"], summary["requests"], inside, slowest))
            if fault is signal.SIGSTOP:
                _signal(stage, stage.addresses[0], signal.SIGCONT)
    return costs


def flap(swings: int = 12, half: float = 2.5) -> Changes:
    """Stop and continue a server `swings` times, `half` seconds each way; count the changes of its health."""
    with Stage("gthread", warm_up=0, settings=SETTINGS, failover=True) as stage, _peer(stage) as proxy:
        address = stage.addresses[0]
        for _ in range(swings):
            _signal(stage, address, signal.SIGSTOP)
            time.sleep(half)  # the rhythm of the fault itself
            _signal(stage, address, signal.SIGCONT)
            time.sleep(half)
        events = stage.client.events(limit=1000)
        entered = [e for e in events if e["server"] == address and e["kind"] in ("health", "quarantine")]
        return Changes(swings, len(entered), 2 * proxy.stat("chkdown")["s0"])


def main(names: list[str]) -> None:
    """Print what was measured."""
    for name in names or ["kill", "hang", "flap"]:
        if name == "flap":
            print(flap())
        else:
            print(*strike({"kill": signal.SIGKILL, "hang": signal.SIGSTOP}[name]), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
