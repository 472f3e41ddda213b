"""Waiting for what is no change: how it stands is shown whenever that is something else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.live import Live
from rich.text import Text

from controller import cli_view as view
from controller.client import Client, Json
from controller.errors import HeadgateError

_POLL = 0.2  # seconds
_ANSWER = 1.0  # seconds after which the daemon says at the latest what is in flight


@contextmanager
def shown() -> Iterator[Callable[[str], None]]:
    """What to call with a sentence: on a terminal it takes the place of the last one, elsewhere it is a line if new."""
    out = view.console()
    if out.is_terminal:
        with Live(console=out, transient=True, auto_refresh=False) as live:
            yield lambda sentence: live.update(Text(sentence), refresh=True)
        return
    said = ""

    def say(sentence: str) -> None:
        nonlocal said
        if sentence != said:
            print(sentence, flush=True)
            said = sentence

    yield say


def until_empty(client: Client, upstream: str, server: str, revision: int, timeout: float) -> None:
    """Wait until nginx, which serves `revision`, has no request in flight at the server; HeadgateError."""
    deadline = time.monotonic() + timeout
    with shown() as say:
        while True:
            left = max(0.0, deadline - time.monotonic())
            in_flight = client.in_flight(upstream, server, revision, min(left, _ANSWER))
            if not in_flight:
                break
            say(f"{upstream}: {server}: {in_flight} in flight")
            if not left:
                message = f"{upstream}: {server} did not become empty within {timeout:g} s ({in_flight} in flight)"
                raise HeadgateError(message, "look at `headgate status`")
    print(f"{upstream}: {server} is empty")


def until_serving(client: Client, upstream: str, server: str, timeout: float) -> None:
    """Wait until the server gets requests; HeadgateError."""
    deadline = time.monotonic() + timeout
    with shown() as say:
        while why := {
            each["address"]: view.hindrance(each)
            for each in client.servers(upstream, server)
            if not each["effective_weight"] > 0
        }:
            if time.monotonic() > deadline:
                message = f"{upstream}: {server} did not get requests within {timeout:g} s ({'; '.join(why.values())})"
                raise HeadgateError(message, "look at `headgate status`")
            say("; ".join(f"{upstream}: {address}: {each}" for address, each in why.items()))
            time.sleep(_POLL)
    print(f"{upstream}: {server} serves")


def until_left(client: Client, answer: Json, server: str, notice: str, timeout: float) -> Json:
    """The answer to an offline notice, asked for again by the notice's id until each server is empty, or so long."""
    deadline = time.monotonic() + timeout
    servers: list[Json] = []
    with shown() as say:
        for upstream in dict.fromkeys(each["upstream"] for each in answer["servers"]):
            found = [each for each in answer["servers"] if each["upstream"] == upstream]
            while any(each["in_flight"] for each in found) and (left := deadline - time.monotonic()) > 0:
                say("; ".join(view.leaving(each, answer["revision"]) for each in found))
                found = client.offline(server, upstream, id=notice, wait=min(left, _ANSWER))["servers"]
            servers += found
    return {**answer, "servers": servers}
