"""The verbs that begin, follow and steer changes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer
from rich.live import Live

from controller import cli_view as view
from controller.client import UNFINISHED, Client, Json
from controller.settings import load

FAILED, INTERRUPTED = 1, 130

_Upstream = Annotated[str, typer.Argument(help="The upstream's name in nginx.conf.", show_default=False)]
_Server = Annotated[str, typer.Argument(help="The server's address as written in nginx.conf.", show_default=False)]
_Servers = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SERVER]...", help="Only these; else every server that is ready.", show_default=False),
]
_SomeServers = Annotated[
    list[str],
    typer.Argument(metavar="SERVER...", help="Their addresses as written in nginx.conf.", show_default=False),
]
_Change = Annotated[int, typer.Argument(metavar="ID", min=1, help="The change.", show_default=False)]
_Batch = Annotated[str, typer.Option("--batch", metavar="N|N%", help="How many servers at once.")]
_BatchOfAll = Annotated[
    str | None, typer.Option("--batch", metavar="N|N%", help="How many at once; all, without.", show_default=False)
]
_MaxUnavailable = Annotated[
    str | None,
    typer.Option(
        "--max-unavailable",
        metavar="N|N%",
        help="Take no server away while more than so many would not serve.",
        show_default=False,
    ),
]
_Force = Annotated[bool, typer.Option("--force", help="Do it even if no other server of the upstream serves.")]
_Queue = Annotated[bool, typer.Option("--queue", help="Wait for the end of a change that is in the way.")]
_RollBack = Annotated[
    bool | None,
    typer.Option(
        "--roll-back/--no-roll-back",
        help="Take what was done back when it fails; else as rollout.on_failure says.",
        show_default=False,
    ),
]
_Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Show progress until it has ended.")]

_UNPLANNED = ("stop", "start", "restart", "scale-out")  # who asks for these names the servers

_OF_SERVERS = {
    "reload": "Drain each server, have its gunicorn master make new workers (HUP), and bring it back.",
    "upgrade": "Drain each server, put a new gunicorn master beside the old one (USR2), then end the old one.",
    "deploy": "Restart each server with the configured deploy command between stop and start; rolls back what fails.",
}

_OF_NAMED = {
    "stop": "Drain servers, then stop their processes.",
    "start": "Start the processes of servers and wait until they are up and warm.",
    "scale-in": "Take servers out of an upstream for good: the traffic, their processes, their lines in nginx.conf.",
}


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    verbs: list[Callable[..., None]] = [
        *(restart, reset, rollout, scale, scale_out),
        *(pause, resume, abort),
    ]
    for verb in verbs:
        app.command(verb.__name__.replace("_", "-"))(verb)
    for kind, summary in _OF_NAMED.items():
        app.command(kind)(_of_named(kind, summary))
    for kind, summary in _OF_SERVERS.items():
        app.command(kind)(_of_servers(kind, summary))
    app.command("roll-back")(roll_back)


def restart(
    context: typer.Context,
    upstream: _Upstream,
    server: _Server,
    force: _Force = False,
    queue: _Queue = False,
    wait: _Wait = True,
) -> None:
    """Drain, stop and start one server, and wait until it is up and warm."""
    _begin(context, "restart", upstream, [server], force=force, queue=queue, wait=wait)


def rollout(
    context: typer.Context,
    upstream: _Upstream,
    batch: _Batch = "1",
    max_unavailable: _MaxUnavailable = None,
    force: _Force = False,
    roll_back: _RollBack = None,
    queue: _Queue = False,
    wait: _Wait = True,
    plan: Annotated[bool, typer.Option("--plan", help="Only show what it would do; begins nothing.")] = False,
) -> None:
    """Restart all servers of an upstream, batch after batch; stops at the first that fails."""
    if plan:
        client = Client(load(context.obj).api.socket)
        view.console().print(
            view.plan(client.plan(upstream, "rollout", (), batch, max_unavailable=max_unavailable, force=force))
        )
        return
    servers: list[str] = []
    words = (context, "rollout", upstream, servers, batch, max_unavailable)
    _begin(*words, force=force, queue=queue, wait=wait, roll_back=roll_back)


def _of_named(kind: str, summary: str) -> Callable[..., None]:
    """A verb that begins a change of this kind, of the servers that are named."""

    def verb(
        context: typer.Context,
        upstream: _Upstream,
        servers: _SomeServers,
        batch: _BatchOfAll = None,
        force: _Force = False,
        queue: _Queue = False,
        wait: _Wait = True,
    ) -> None:
        _begin(context, kind, upstream, servers, batch, force=force, queue=queue, wait=wait)

    verb.__doc__ = summary
    return verb


def _of_servers(kind: str, summary: str) -> Callable[..., None]:
    """A verb that begins a change of this kind, of some servers of an upstream or of all."""

    def verb(
        context: typer.Context,
        upstream: _Upstream,
        servers: _Servers = None,
        batch: _Batch = "1",
        max_unavailable: _MaxUnavailable = None,
        roll_back: _RollBack = None,
        force: _Force = False,
        queue: _Queue = False,
        wait: _Wait = True,
    ) -> None:
        words = (context, kind, upstream, servers or [], batch, max_unavailable)
        _begin(*words, force=force, queue=queue, wait=wait, roll_back=roll_back)

    verb.__doc__ = summary
    return verb


def roll_back(
    context: typer.Context,
    upstream: Annotated[
        str | None, typer.Argument(help="The upstream's name in nginx.conf.", show_default=False)
    ] = None,
    servers: _Servers = None,
    change: Annotated[
        int | None,
        typer.Option("--change", metavar="ID", min=1, help="What this change has brought.", show_default=False),
    ] = None,
    batch: _Batch = "1",
    max_unavailable: _MaxUnavailable = None,
    force: _Force = False,
    queue: _Queue = False,
    wait: _Wait = True,
) -> None:
    """Restart each server, the last one first, with the configured roll_back command between stop and start.

    With --change only the servers that have what that change brought; it is stopped first if it is under way.
    """
    if change is None and upstream is not None:
        words = (context, "roll-back", upstream, servers or [], batch, max_unavailable)
        _begin(*words, force=force, queue=queue, wait=wait)
        return
    if change is None or upstream is not None:
        raise typer.BadParameter("say either UPSTREAM, with its servers or without, or --change ID")
    if max_unavailable or force or queue or batch != "1":
        raise typer.BadParameter("with --change nothing else is chosen: it goes back as it came")
    client = Client(load(context.obj).api.socket)
    number = client.roll_back(change)
    if wait:
        follow(client, number, wanted="aborted" if number == change else "done")
    else:
        print(f"change {number} rolls change {change} back; follow it with: headgate changes {number} --wait")


def scale(
    context: typer.Context,
    upstream: _Upstream,
    workers: Annotated[int, typer.Option("--workers", min=1, help="How many workers.", show_default=False)],
    servers: _Servers = None,
    batch: _Batch = "1",
    max_unavailable: _MaxUnavailable = None,
    force: _Force = False,
    queue: _Queue = False,
    wait: _Wait = True,
) -> None:
    """Bring each gunicorn master to so many workers (TTIN, TTOU)."""
    _begin(
        context, "scale", upstream, servers or [], batch, max_unavailable, workers, force=force, queue=queue, wait=wait
    )


def reset(
    context: typer.Context,
    upstream: _Upstream,
    servers: _Servers = None,
    batch: _Batch = "1",
    max_unavailable: _MaxUnavailable = None,
    force: _Force = False,
    queue: _Queue = False,
    wait: _Wait = True,
) -> None:
    """Restart each server and forget what is held against it: quarantines, ejections, flaps, maintenance."""
    _begin(context, "reset", upstream, servers or [], batch, max_unavailable, force=force, queue=queue, wait=wait)


def scale_out(
    context: typer.Context,
    upstream: _Upstream,
    servers: _SomeServers,
    weight: Annotated[int, typer.Option("--weight", min=1, help="Of each new server.")] = 1,
    batch: _BatchOfAll = None,
    queue: _Queue = False,
    wait: _Wait = True,
) -> None:
    """Add servers to an upstream: their lines in nginx.conf, their processes, and the traffic."""
    _begin(context, "scale-out", upstream, servers, batch, weight=weight, force=False, queue=queue, wait=wait)


def pause(context: typer.Context, change: _Change) -> None:
    """Have a change begin no further server; those under way come to their end."""
    _steer(context, change, "pause")


def resume(context: typer.Context, change: _Change) -> None:
    """Have a paused change go on."""
    _steer(context, change, "resume")


def abort(context: typer.Context, change: _Change, wait: _Wait = True) -> None:
    """End a change: servers not yet told to stop get their place back, the others are brought up again."""
    client = _steer(context, change, "abort")
    if wait:
        follow(client, change, wanted="aborted")


# --- behind the verbs ---------------------------------------------------------------------------------------------


def _begin(
    context: typer.Context,
    kind: str,
    upstream: str,
    servers: list[str],
    batch: str | None = None,
    max_unavailable: str | None = None,
    workers: int = 0,
    *,
    weight: int = 1,
    force: bool,
    queue: bool,
    wait: bool,
    roll_back: bool | None = None,
) -> None:
    client = Client(load(context.obj).api.socket)
    most = _number(max_unavailable) if max_unavailable else None
    if kind not in _UNPLANNED:
        foreseen = client.plan(
            upstream,
            kind,
            tuple(servers),
            batch or "",
            max_unavailable=max_unavailable,
            workers=workers,
            force=force,
            advise=False,
        )
        for warning in view.warnings(foreseen):
            view.console(sys.stderr).print(warning)
    change = client.begin_change(
        kind,
        upstream,
        tuple(servers),
        _number(batch) if batch else None,
        force,
        max_unavailable=most,
        workers=workers,
        weight=weight,
        queue=queue,
        roll_back=roll_back,
    )
    if wait:
        follow(client, change)
    else:
        how = "is queued" if queue and client.change(change)["status"] == "queued" else "begins"
        print(f"change {change}: {kind} of {upstream} {how}; follow it with: headgate changes {change} --wait")


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _steer(context: typer.Context, change: int, wish: str) -> Client:
    client = Client(load(context.obj).api.socket)
    print(f"change {change}: {client.steer(change, wish)}")
    return client


def follow(client: Client, change: int, timeout: float | None = None, wanted: str = "done") -> None:
    """Show a change until it ends, then its table; exits unless it ends as wanted, without a step that failed."""
    deadline = None if timeout is None else time.monotonic() + timeout
    out = view.console()
    record: Json = {}
    try:
        with Live(console=out, transient=True, auto_refresh=False) if out.is_terminal else _Lines() as shown:
            for record in client.follow_change(change):
                if isinstance(shown, _Lines):
                    shown.update(record)
                else:
                    shown.update(view.progress(record, _in_flight(client, record)), refresh=True)
                if deadline is not None and time.monotonic() > deadline and record["status"] in UNFINISHED:
                    break
    except KeyboardInterrupt:
        raise _left(change, INTERRUPTED, "interrupted") from None
    if record["status"] in UNFINISHED:
        raise _left(change, FAILED, f"not done within {timeout:g} s")
    out.print(view.steps(record))
    if record["status"] != wanted or any(step["state"] == "failed" for step in record["steps"]):
        raise typer.Exit(FAILED)


def _left(change: int, code: int, why: str) -> typer.Exit:
    print(
        f"{why}: change {change} goes on in the daemon; follow it with: headgate changes {change} --wait",
        file=sys.stderr,
    )
    return typer.Exit(code)


def _in_flight(client: Client, change: Json) -> dict[str, int]:
    if change["status"] not in UNFINISHED:
        return {}
    return {each["address"]: each["in_flight"] for each in client.upstream(change["upstream"])["servers"]}


class _Lines:
    """Progress where there is no terminal: each step that begins or ends is one line."""

    def __init__(self) -> None:
        self._said = "running"
        self._begun: set[int] = set()
        self._ended: set[int] = set()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()

    def update(self, change: Json) -> None:
        """Print what is new."""
        if change["status"] != self._said and change["status"] in UNFINISHED:
            self._said = change["status"]
            print(view.sentence(change), flush=True)
        for number, step in enumerate(change["steps"]):
            if step["state"] == "skipped":
                continue
            if step["ended_at"] is not None and number not in self._ended:
                self._ended.add(number)
                print(view.step_line(step), flush=True)
            elif step["state"] == "running" and number not in self._begun:
                self._begun.add(number)
                print(view.step_line(step), flush=True)
