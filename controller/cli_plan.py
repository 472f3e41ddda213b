"""The command `headgate plan`: what an operation would do; without a daemon, to servers that are all up."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated, Any, Literal

import typer

from controller import cli_view as view
from controller.client import Client
from controller.errors import DaemonUnreachable
from controller.settings import Settings, load

Json = dict[str, Any]
Kind = Literal["rollout", "restart", "reset", "stop", "reload", "upgrade", "deploy", "roll-back", "scale", "scale-in"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)


def plan(
    context: typer.Context,
    kind: Annotated[Kind, typer.Argument(show_default=False)],
    upstream: Annotated[str, typer.Argument(help="The upstream's name in nginx.conf.", show_default=False)],
    servers: Annotated[list[str] | None, typer.Argument(metavar="[SERVER]...", help="These; all, without.")] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="N|N%", help="How many at once.", show_default=False)] = "",
    max_unavailable: Annotated[
        str | None,
        typer.Option("--max-unavailable", metavar="N|N%", help="How many may be away at once.", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="What a scale is to reach.", show_default=False)] = 0,
    capacity: Annotated[
        float | None,
        typer.Option(
            "--capacity", metavar="REQUESTS/S", help="What one server of weight 1 can take.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The API's answer as it is.")] = False,
) -> None:
    """Show what an operation would do to the capacity, and which batch is safe; begins nothing. Needs no daemon."""
    settings = load(context.obj)
    names = tuple(servers or ())
    try:
        foreseen = Client(settings.api.socket).plan(
            upstream, kind, names, batch, capacity, max_unavailable=max_unavailable, workers=workers
        )
    except DaemonUnreachable:
        print("no daemon runs: planned for servers that are all up and warm, without their traffic", file=sys.stderr)
        foreseen = asyncio.run(
            _without_daemon(settings, upstream, kind, names, batch, capacity, max_unavailable, workers)
        )
    if as_json:
        print(json.dumps(foreseen, indent=2))
    else:
        view.console().print(view.plan(foreseen))


async def _without_daemon(settings: Settings, upstream: str, *wish: Any) -> Json:
    from controller.adapters.nginx.files import NginxFiles
    from controller.api.plan import planned_from

    # An upstream can be planned for before it is adopted.
    config = await NginxFiles(settings.nginx.conf, settings.policy_for, managed=lambda block: True).read()
    return planned_from(config, settings.check_for(upstream), upstream, *wish)
