"""The commands that look back: history, explain. What they show is worded in cli_view.py and by the daemon."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from controller import cli_view as view
from controller.client import Client
from controller.settings import load
from controller.settings.values import PositiveDuration

_SECONDS: TypeAdapter[float] = TypeAdapter(PositiveDuration)
_AsJson = Annotated[bool, typer.Option("--json", help="The API's answer as it is.")]
_Upstream = Annotated[str, typer.Argument(help="The upstream's name in nginx.conf.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (history, explain):
        app.command()(command)


def history(
    context: typer.Context,
    upstream: _Upstream,
    since: Annotated[
        str, typer.Option("--since", metavar="DURATION", help="How far to look back: 90s, 5m, 2h.")
    ] = "5m",
    step: Annotated[
        str | None, typer.Option("--step", metavar="DURATION", help="One line for so long.", show_default=False)
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Show the requests a second of each server, and what happened meanwhile."""
    now = time.time()
    width = None if step is None else max(1, round(_seconds(step, "--step")))
    answer = _client(context).traffic(upstream, now - _seconds(since, "--since"), now, width)
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        view.console().print(view.history(answer, now))


def explain(
    context: typer.Context,
    upstream: _Upstream,
    server: Annotated[str, typer.Argument(help="The server's address as written in nginx.conf.", show_default=False)],
    as_json: _AsJson = False,
) -> None:
    """Say why a server gets what it gets, from what was recorded."""
    answer = _client(context).explain(upstream, server)
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        view.console().print(view.explanation(answer), end="")


def _client(context: typer.Context) -> Client:
    return Client(load(context.obj).api.socket)


def _seconds(text: str, option: str) -> float:
    try:
        return _SECONDS.validate_python(text)
    except ValidationError as error:
        raise typer.BadParameter(error.errors()[0]["msg"], param_hint=option) from error
