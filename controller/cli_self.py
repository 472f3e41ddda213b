"""`drain --self` and `enable --self`: a systemd unit says of its own server that it goes, and that it is back.

They stand in ExecStop= and ExecStartPost= (controller/systemd/application.conf). Whatever goes wrong here must not keep
the unit from stopping or starting: both take a bounded time, say what is wrong, and end with 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from controller import cli_view as view
from controller.adapters import own
from controller.adapters.systemd import systemctl
from controller.client import Client, Json
from controller.errors import ApiError, HeadgateError
from controller.settings import load

_LISTENS = 10.0  # seconds in which a started server begins to listen
_POLL = 0.2  # seconds; nobody is told when a socket begins to listen, or when another server may be spared
_ANSWER = 5.0  # seconds for systemd
_LONGEST = 600.0  # seconds that the API lets a notice wait


def leave(config: str | None, port: int | None, wait: bool, timeout: float | None) -> None:
    """Announce that this unit's server goes offline; with `wait`, until nothing is in flight.

    The server is what the unit's main process ($MAINPID) listens on, or that of this machine with this `port`. It waits
    `timeout` seconds at the most, else as long as drain.timeout says. Where no other server serves now, and the unit is
    being restarted and not just stopped, it waits for one: so units that are restarted all at once go in turn.
    """
    with _never_in_the_way("it stops without a drain"):
        settings = load(config)
        client = Client(settings.api.socket)
        servers = _own(client, port, 0.0)
        if timeout is None:
            names = {upstream["name"] for upstreams in servers.values() for upstream in upstreams}
            timeout = max(settings.policy_for(name).drain.timeout for name in names)
        deadline = time.monotonic() + timeout if wait else 0.0
        for address, upstreams in servers.items():
            others = [each for upstream in upstreams for each in upstream["servers"] if each["address"] != address]
            _offline(client, address, deadline, hope=any(each["admin"] == "ready" for each in others))


def come(config: str | None, port: int | None) -> None:
    """Announce that this unit's server is there again: its quarantine ends and it is probed at once."""
    with _never_in_the_way("Headgate finds out by itself"):
        client = Client(load(config).api.socket)
        for address in _own(client, port, _LISTENS):
            answer = client.online(address)
            print(f"{address} is announced and probed (table {answer['revision']})")


def _offline(client: Client, address: str, deadline: float, hope: bool) -> None:
    while True:
        left = min(max(0.0, deadline - time.monotonic()), _LONGEST)
        try:
            answer = client.offline(address, why="its unit stops", wait=left)
        except ApiError as error:
            if error.code != "guard":
                raise
            answer = {"servers": [], "refused": [error.message]}
        if not (answer["refused"] and left and hope and _restarting()):
            break
        time.sleep(_POLL)
    for each in answer["servers"]:
        print(view.leaving(each, answer["revision"]))
    for message in answer["refused"]:
        print(f"headgate: {message}", file=sys.stderr)


def _own(client: Client, port: int | None, patience: float) -> dict[str, list[Json]]:
    """The server that this unit is, with its upstreams; several where it listens on several addresses of nginx's.

    HeadgateError where it is none of them, `patience` seconds long.
    """
    serving = defaultdict(list)
    for upstream in client.status()["upstreams"]:
        for server in upstream["servers"]:
            serving[server["address"]].append(upstream)
    if port is not None:
        found, who = own.at_port(port, serving), f"port {port} of this machine"
    else:
        main = os.environ.get("MAINPID", "")
        if not main.isdecimal():
            remedy = "use it in ExecStop= or ExecStartPost=, or name its --port"
            raise HeadgateError("systemd names no main process (MAINPID)", remedy)
        who = f"process {main}"
        deadline = time.monotonic() + patience
        while not (found := own.served_by(int(main), serving)) and time.monotonic() < deadline:
            time.sleep(_POLL)
    if not found:
        raise HeadgateError(f"{who} is no server of an upstream that Headgate manages", "see `headgate status`")
    return {address: serving[address] for address in found}


def _restarting() -> bool:
    """Whether systemd will start our unit again as soon as it has stopped."""
    found = re.search(r"/([^/]+\.service)(?:/|$)", Path("/proc/self/cgroup").read_text("utf-8"), re.MULTILINE)
    if found is None:
        return False
    code, said = asyncio.run(systemctl(_ANSWER, "list-jobs", "--no-legend", "--plain", "--full"))
    return not code and any(line.split()[1:3] == [found[1], "restart"] for line in said.splitlines())


@contextlib.contextmanager
def _never_in_the_way(then: str) -> Iterator[None]:
    try:
        yield
    except HeadgateError as error:
        print(f"headgate: {error}; {then}", file=sys.stderr)
