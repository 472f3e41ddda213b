"""The commands that change nginx's files: adopt, release, server. What they change is decided in adopt.py."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Annotated, Literal

import typer

from controller import adopt as adoption
from controller.adapters.nginx.writer import Changed
from controller.client import Client
from controller.conf.draft import EditRefused, Reason
from controller.conf.edit import AddServer, Edit, RemoveServer, SetParameter
from controller.errors import ApiError, DaemonUnreachable, HeadgateError
from controller.settings import Settings, load

ATTEMPTS = 3
"""How often a change is planned anew because somebody edited the same files meanwhile."""

_USAGE = {Reason.NO_UPSTREAM, Reason.NO_SERVER, Reason.BAD_VALUE}

Diff = Annotated[bool, typer.Option("--diff", help="Only show what would change.")]
Yes = Annotated[bool, typer.Option("--yes", help="Ask nothing.")]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (adopt, release, server):
        app.command()(command)


def adopt(
    context: typer.Context,
    upstreams: Annotated[
        list[str] | None, typer.Argument(metavar="[UPSTREAM]...", help="These; all that can be, without.")
    ] = None,
    diff: Diff = False,
    yes: Yes = False,
) -> None:
    """Put upstreams of nginx.conf under Headgate's care. Needs no daemon."""
    settings = load(context.obj)
    names = tuple(upstreams or ())
    done = _change(settings, lambda: adoption.adoption(settings, names), "Write this and reload nginx?", diff, yes)
    _tell(done, "adopted", diff)
    if done.writes and not diff:
        try:
            Client(settings.api.socket).reread()
        except DaemonUnreachable:
            print("no daemon runs; nginx balances by itself until `headgate run`")


def release(context: typer.Context, diff: Diff = False, yes: Yes = False) -> None:
    """Take everything out of nginx.conf again that adopt put there, byte for byte. Needs no daemon."""
    settings = load(context.obj)
    done = _change(settings, lambda: adoption.release(settings), "Write this and reload nginx?", diff, yes)
    _tell(done, "released", diff)


def server(
    context: typer.Context,
    action: Annotated[Literal["add", "remove", "set"], typer.Argument(show_default=False)],
    upstream: Annotated[str, typer.Argument(help="The upstream's name in nginx.conf.", show_default=False)],
    address: Annotated[
        str, typer.Argument(metavar="SERVER", help="Its address as written in nginx.conf.", show_default=False)
    ],
    parameters: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PARAMETER]...", help="As in nginx.conf; with set, NAME= takes it out."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Do it even if no other server of the upstream serves.")
    ] = False,
    diff: Diff = False,
    yes: Yes = False,
) -> None:
    """Add, remove or change a server line, and the traffic with it."""
    settings = load(context.obj)
    edits = _edits(action, upstream, address, parameters or [])
    if diff:
        _change(settings, lambda: adoption.servers(settings, edits), "", diff, yes)
        return
    client = Client(settings.api.socket)
    shown = client.upstream(upstream)  # whoever cannot change the traffic does not change the file either
    leaves = action == "remove" or SetParameter(upstream, address, "down", "") in edits
    serving = [each["address"] for each in shown["servers"] if each["effective_weight"] > 0]
    if leaves and not force and serving and all(each.partition("@")[0] == address for each in serving):
        message = f"{address}: no other server of {upstream} serves"
        raise ApiError(409, "guard", message, "bring another one up first, or insist with --force")
    # Whether that takes a reload is for the data plane to know: it marks what nobody has probed before nginx sees it.
    done = _change(settings, lambda: adoption.servers(settings, edits), "Write this?", diff, yes, reload=False)
    if not done.writes and not done.meant:
        print("there is nothing to do: the line says so already")
        return
    try:
        answer = client.reread([_meant(each) for each in done.meant])
    except (ApiError, DaemonUnreachable):
        if done.writes:
            print("the file is written; nginx follows it as soon as the daemon can have it so", file=sys.stderr)
        raise
    print(f"nginx follows it (table {answer['revision']})")


def _change(
    settings: Settings, plan: Callable[[], adoption.Plan], question: str, diff: bool, yes: bool, reload: bool = True
) -> adoption.Plan:
    """Plan, show, ask and carry out; again when somebody edited meanwhile. The plan that was carried out."""
    if not diff:
        for sentence in asyncio.run(adoption.recover(settings)):
            print(sentence)
    for attempt in range(ATTEMPTS):
        wanted = _planned(plan)
        if shown := wanted.shown():
            print(shown)
        owed = reload and adoption.owed(settings)
        if owed:
            print("nginx may not have loaded what an earlier command wrote: it was interrupted")
        if diff or not (wanted.writes or wanted.meant or owed):
            break
        if not yes and not typer.confirm(question):
            raise HeadgateError("nothing was changed")
        if not wanted.writes and not owed:
            break
        try:
            asyncio.run(adoption.carry_out(settings, wanted, print, reload=reload))
        except Changed as changed:
            if attempt == ATTEMPTS - 1:
                raise
            print(f"{changed.message}; planned again", file=sys.stderr)
        else:
            break
    return wanted


def _planned(plan: Callable[[], adoption.Plan]) -> adoption.Plan:
    try:
        return plan()
    except EditRefused as refused:
        if refused.reason in _USAGE:
            raise typer.BadParameter(str(refused)) from refused
        raise HeadgateError(str(refused)) from refused


def _tell(done: adoption.Plan, what: str, diff: bool) -> None:
    """Say what has become of it."""
    for reason in done.left:
        print(f"left to nginx: {reason}")
    for note in done.notes:
        print(f"note: {note}")
    if not done.writes:
        print(f"there is nothing to do: everything that can be is {what} already")
    elif not diff:
        print(f"{what}: {', '.join(done.upstreams) or 'no upstream'}")


def _meant(wish: SetParameter) -> dict[str, object]:
    return {
        "upstream": wish.upstream,
        "server": wish.address,
        "number": wish.occurrence or 0,
        "parameter": wish.name,
        "value": wish.value,
    }


def _edits(action: str, upstream: str, address: str, parameters: list[str]) -> list[Edit]:
    pairs = {name: (value, sign) for name, sign, value in (each.partition("=") for each in parameters)}
    if len(pairs) < len(parameters):
        raise typer.BadParameter("a parameter is named twice")
    if action == "add":
        return [AddServer(upstream, address, {name: value for name, (value, _) in pairs.items()})]
    if action == "remove":
        if pairs:
            raise typer.BadParameter("remove takes no parameters")
        return [RemoveServer(upstream, address)]
    if not pairs:
        raise typer.BadParameter("set needs parameters, such as weight=3 or down, or down= to take it out")
    return [
        SetParameter(upstream, address, name, value if value or not sign else None)
        for name, (value, sign) in pairs.items()
    ]
