"""The command `headgate`: words on the command line to calls of the API, answers to tables (cli_view.py). No decisions.

Exit codes: 0 done, 1 failed, 2 usage or settings, 3 daemon not reachable, 4 refused by a guard, 130 interrupted.
"""

from __future__ import annotations

import io
import json
import sys
import time
import uuid
from importlib.metadata import version as distribution_version
from typing import Annotated, Any

import typer
from rich.live import Live

from controller import (
    cli_change,
    cli_conf,
    cli_doctor,
    cli_edge,
    cli_history,
    cli_install,
    cli_plan,
    cli_self,
    cli_wait,
)
from controller import cli_view as view
from controller.client import Client, Json
from controller.errors import ApiError, DaemonUnreachable, HeadgateError, SettingsError
from controller.settings import Settings
from controller.settings import load as load_settings

FAILED, USAGE, UNREACHABLE, REFUSED = 1, 2, 3, 4

app = typer.Typer(
    name="headgate",
    help="Backends behind nginx come online and go offline without losing one request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_Upstream = Annotated[str, typer.Argument(help="The upstream's name in nginx.conf.", show_default=False)]
_Server = Annotated[str, typer.Argument(help="The server's address as written in nginx.conf.", show_default=False)]
_Only = Annotated[
    str | None, typer.Option("--upstream", help="Only there; without it wherever the server is.", show_default=False)
]
_Force = Annotated[bool, typer.Option("--force", help="Do it even if no other server of the upstream serves.")]
_Wait = Annotated[bool, typer.Option("--wait", help="Wait until it has taken effect.")]
_Timeout = Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait, with --wait.")]
_Own = Annotated[bool, typer.Option("--self", help="The server of the systemd unit in which this runs (ExecStop=).")]
_Port = Annotated[
    int | None, typer.Option("--port", min=1, max=65535, help="With --self: the server is known by this port.")
]
_AsJson = Annotated[bool, typer.Option("--json", help="The API's answer as it is.")]


def main() -> None:
    """Run the command and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names and paths in nginx.conf need not be UTF-8
    try:
        app()
    except HeadgateError as error:
        err = view.console(sys.stderr)
        err.print(f"headgate: {error.message}", style="red", markup=False)
        if error.remedy:
            err.print(f"  {error.remedy}", markup=False)
        sys.exit(_exit_code(error))


@app.callback()
def _options(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            envvar="HEADGATE_CONFIG",
            help="The settings; without it /etc/headgate/headgate.toml where it exists.",
            show_default=False,
        ),
    ] = None,
) -> None:
    context.obj = config


@app.command()
def run(context: typer.Context) -> None:
    """Run the daemon in the foreground."""
    from controller import daemon

    raise typer.Exit(daemon.run(context.obj))


@app.command()
def demo(
    once: Annotated[
        bool, typer.Option("--once", envvar="ONCE", help="End after the rollout instead of staying up.")
    ] = False,
) -> None:
    """Restart three live gunicorn servers behind nginx under load, and count what fails."""
    from controller import demo as stage

    raise typer.Exit(stage.run(once))


@app.command()
def status(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second, until Ctrl-C.")] = False,
    as_json: _AsJson = False,
) -> None:
    """Show upstreams and servers as they are."""
    client = _client(context)
    if as_json:
        _print_json(client.status())
    elif watch:
        _watch(client)
    else:
        view.console().print(view.status(client.status()))


@app.command()
def drain(
    context: typer.Context,
    upstream: _Upstream = "",
    server: _Server = "",
    wait: _Wait = False,
    force: _Force = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", min=0, help="Seconds to wait, with --wait; without it 60, with --self drain.timeout."
        ),
    ] = None,
    own: _Own = False,
    port: _Port = None,
) -> None:
    """Send no new request to a server; with --wait, until those under way have ended."""
    if _is_own(own, upstream, server):
        cli_self.leave(context.obj, port, wait, timeout)
        return
    client = _client(context)
    answer = client.set_admin(upstream, server, "drain", force)
    change = answer["change"]
    print(f"{upstream}: {server} drains; no new request reaches it (table {answer['revision']}, change {change})")
    if wait:
        cli_change.follow(client, change, 60.0 if timeout is None else timeout)


@app.command()
def enable(
    context: typer.Context,
    upstream: _Upstream = "",
    server: _Server = "",
    wait: _Wait = False,
    timeout: _Timeout = 60.0,
    own: _Own = False,
    port: _Port = None,
) -> None:
    """Make a server ready again; with --wait, until it gets requests."""
    if _is_own(own, upstream, server):
        cli_self.come(context.obj, port)
        return
    client = _client(context)
    answer = client.set_admin(upstream, server, "ready")
    print(f"{upstream}: {server} is ready (table {answer['revision']})")
    if wait:
        cli_wait.until_serving(client, upstream, server, timeout)


@app.command()
def maint(
    context: typer.Context,
    upstream: _Upstream,
    server: _Server,
    wait: _Wait = False,
    force: _Force = False,
    timeout: _Timeout = 60.0,
) -> None:
    """Take a server out and let its probes rest; with --wait, until requests under way have ended."""
    client = _client(context)
    answer = client.set_admin(upstream, server, "maint", force)
    print(f"{upstream}: {server} is under maintenance; no new request reaches it (table {answer['revision']})")
    if wait:
        cli_wait.until_empty(client, upstream, server, answer["revision"], timeout)


@app.command("warm-up")
def warm_up(context: typer.Context, upstream: _Upstream, server: _Server) -> None:
    """Let a server warm up anew."""
    answer = _client(context).warm_up(upstream, server)
    print(f"{upstream}: {server} warms up (table {answer['revision']})")


@app.command()
def offline(
    context: typer.Context,
    server: _Server,
    upstream: _Only = None,
    wait: Annotated[
        float, typer.Option("--wait", min=0, max=600, metavar="SECONDS", help="Wait so long for requests under way.")
    ] = 0,
) -> None:
    """Announce that a server goes offline: it gets no new request until its quarantine ends."""
    client, notice = _client(context), uuid.uuid4().hex
    answer = client.offline(server, upstream, id=notice, why="announced by hand")
    answer = cli_wait.until_left(client, answer, server, notice, wait)
    for each in answer["servers"]:
        print(view.leaving(each, answer["revision"]))
    for refused in answer["refused"]:
        print(f"headgate: {refused}", file=sys.stderr)
    if answer["refused"]:
        raise typer.Exit(REFUSED)
    if wait and any(each["in_flight"] for each in answer["servers"]):
        raise typer.Exit(FAILED)


@app.command()
def online(context: typer.Context, server: _Server, upstream: _Only = None) -> None:
    """Announce that a server is there again: its quarantine ends and it is probed at once."""
    answer = _client(context).online(server, upstream)
    print(f"{server} is announced and probed (table {answer['revision']})")


@app.command()
def changes(
    context: typer.Context,
    change: Annotated[int | None, typer.Argument(metavar="[ID]", min=1, help="Show this one, step by step.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="With an ID: show progress until it has ended.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many to list.")] = 20,
    as_json: _AsJson = False,
) -> None:
    """List operations, or show one step by step."""
    client = _client(context)
    if change is None:
        listed = client.changes(limit)
        if as_json:
            _print_json({"changes": listed})
        else:
            view.console().print(view.changes(listed) if listed else "there has been no change yet")
    elif wait:
        cli_change.follow(client, change)
    elif as_json:
        _print_json(client.change(change))
    else:
        view.console().print(view.steps(client.change(change)))


@app.command()
def events(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with new ones as they come, until Ctrl-C.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many of the past to show.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show what happened."""
    client, out = _client(context), view.console()

    def show(record: Json) -> None:
        if as_json:
            print(json.dumps(record), flush=True)
        else:
            out.print(view.event(record))
            out.file.flush()

    past = client.events(limit=limit)
    for record in past:
        show(record)
    if follow:
        try:
            for record in client.follow_events(past[-1]["id"] if past else 0):
                show(record)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None


@app.command()
def include(context: typer.Context) -> None:
    """Print the file that nginx.conf includes in http{}, with the paths of this installation."""
    from controller.adapters.nginx.lua import render_include
    from controller.resources import lua_dir, nginx_dir

    nginx = _settings(context).nginx
    template = (nginx_dir() / "headgate.conf").read_text()
    try:
        text = render_include(template, lua=str(lua_dir()), socket=nginx.control, snapshot=nginx.snapshot)
    except ValueError as error:
        raise SettingsError(f"[nginx] control or snapshot: {error}") from error
    print(text, end="")


@app.command()
def version() -> None:
    """Print the version."""
    print(f"headgate {distribution_version('headgate')}")


cli_change.register(app)
cli_doctor.register(app)
cli_edge.register(app)
cli_conf.register(app)
cli_install.register(app)
cli_history.register(app)
cli_plan.register(app)


# --- behind the commands ------------------------------------------------------------------------------------------


def _exit_code(error: HeadgateError) -> int:
    match error:
        case DaemonUnreachable():
            return UNREACHABLE
        case SettingsError() | ApiError(code="not_found" | "invalid"):
            return USAGE
        case ApiError(code="guard" | "busy"):
            return REFUSED
    return FAILED


def _is_own(own: bool, upstream: str, server: str) -> bool:
    """Whether the unit's own server is meant, and not one that is named."""
    if (own and upstream) or not (own or server):
        raise typer.BadParameter("name UPSTREAM and SERVER, or neither and say --self")
    return own


def _settings(context: typer.Context) -> Settings:
    return load_settings(context.obj)


def _client(context: typer.Context) -> Client:
    return Client(_settings(context).api.socket)


def _print_json(answer: Any) -> None:
    print(json.dumps(answer, indent=2))


def _watch(client: Client) -> None:
    out = view.console()
    try:
        if out.is_terminal:
            with Live(console=out, auto_refresh=False, screen=True) as live:
                while True:
                    live.update(view.status(client.status()), refresh=True)
                    time.sleep(1)
        while True:
            out.print(view.status(client.status()), "")
            out.file.flush()
            time.sleep(1)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
