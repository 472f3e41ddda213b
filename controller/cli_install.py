"""The commands around systemd: install, and reread for the unit's reload. What is written is decided in install.py."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from controller import adopt
from controller import install as plans
from controller.adapters.systemd import Unit, seconds, systemctl
from controller.cli_conf import Diff, Yes
from controller.client import Client
from controller.conf.diff import FileEdit
from controller.errors import HeadgateError
from controller.install import CannotInstall, File
from controller.settings import DEFAULT_FILE, Settings, load

_START = 120.0  # seconds in which the unit's own TimeoutStartSec has ended a start
_ANSWER = 20.0  # seconds for everything else
_OURS = " drain --self "  # in the ExecStop of our drop-in


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (install, reread):
        app.command()(command)


def reread(
    context: typer.Context,
    pid: Annotated[
        int | None,
        typer.Option("--pid", min=2, help="The daemon, if it shall read headgate.toml again, too.", show_default=False),
    ] = None,
) -> None:
    """Have nginx.conf read again now; fails where it, or headgate.toml, is wrong."""
    client = Client(load(context.obj).api.socket)
    if pid is not None:
        try:
            os.kill(pid, signal.SIGHUP)  # taken before the call below, which comes later
        except OSError as error:
            raise HeadgateError(f"process {pid} cannot be sent HUP: {error.strerror}", "use sudo") from error
    answer = client.reread()
    for warning in answer["warnings"]:
        print(f"note: {warning}")
    print(f"nginx follows it (table {answer['revision']})")


def install(
    context: typer.Context,
    app: Annotated[
        list[str] | None,
        typer.Option("--app", metavar="UNIT", help="Let this unit of an application drain before it stops."),
    ] = None,
    diff: Diff = False,
    yes: Yes = False,
    uninstall: Annotated[bool, typer.Option("--uninstall", help="Take out again what was installed.")] = False,
    purge: Annotated[bool, typer.Option("--purge", help="With --uninstall: delete settings and state, too.")] = False,
    root: Annotated[
        Path | None,
        typer.Option(metavar="DIRECTORY", help="Only write the files, below this directory.", show_default=False),
    ] = None,
) -> None:
    """Make Headgate a service of systemd, or a unit of an application drain before it stops. Needs no daemon."""
    if purge and (app or not uninstall):
        raise typer.BadParameter("--purge goes with --uninstall alone")
    config = os.path.abspath(context.obj or DEFAULT_FILE)
    units = [_unit_name(each) for each in app or ()]
    settings = load(config if os.path.exists(config) else None)
    place = root or Path("/")
    if root is None:
        _see_systemd()
    if uninstall:
        files = plans.removal(place, units, config if purge else None)
        if not (units or root):
            _see_released(settings)
    elif units:
        if root is None:
            for unit in units:
                asyncio.run(_see_application(unit, settings))
        files = tuple(plans.application(unit, config, place) for unit in units)
    else:
        files = plans.service(settings, config, place)
        for name, tables in settings.upstream.items():
            if tables.process and tables.process.start and not tables.process.unit:
                print(f"note: what `start` of {name} starts lives in the cage of {plans.UNIT}; rather give it a unit")
    files = tuple(file for file in files if file.changes)
    print("".join(file.shown() for file in files), end="")
    if diff:
        print(f"would change: {', '.join(str(file.path) for file in files) or 'nothing'}")
        return
    if files and not yes and not typer.confirm("Take this out?" if uninstall else "Write this?"):
        raise HeadgateError("nothing was changed")
    if root is not None:
        plans.write(files)
    elif uninstall:
        asyncio.run(_take_out(files, bool(units)))
        if not units:
            _forget(purge, yes)
    else:
        asyncio.run(_put_in(files, bool(units)))


# --- what systemd is told -----------------------------------------------------------------------------------------


async def _put_in(files: Sequence[File], only_applications: bool) -> None:
    plans.write(files)
    unit = Unit(plans.UNIT)
    if files:
        await _do("daemon-reload")
    if only_applications:
        for file in files:
            print(f"{file.path} is in force: it drains from its next stop on")
        if not files:
            print("nothing to do: it is so already")
        return
    await _tmpfiles()
    enabled, _ = await systemctl(_ANSWER, "is-enabled", "--quiet", plans.UNIT)
    active, _ = await systemctl(_ANSWER, "is-active", "--quiet", plans.UNIT)
    if enabled == 0 and active == 0 and not files:
        print(f"nothing to do: {plans.UNIT} runs, and starts at boot")
        return
    await _do("enable", plans.UNIT)
    await _do("restart" if active == 0 and any(file.path.name == plans.UNIT for file in files) else "start", plans.UNIT)
    print(f"{plans.UNIT} runs (pid {(await unit.state()).main}), and starts at boot")


async def _take_out(files: Sequence[File], only_applications: bool) -> None:
    if not only_applications and any(file.path.name == plans.UNIT for file in files):
        await _do("disable", "--now", plans.UNIT)
    plans.write(files)
    if files:
        await _do("daemon-reload")
    for file in files:
        print(f"{file.path} is gone")
    if not files:
        print("nothing to do: nothing of it is installed")


async def _do(*words: str) -> None:
    code, said = await systemctl(_START, *words)
    if code:
        report = f"\n{await Unit(words[-1]).report()}" if len(words) > 1 else ""
        raise HeadgateError(f"systemctl {' '.join(words)}: {said}{report}", f"see `journalctl -u {plans.UNIT}`")


async def _tmpfiles() -> None:
    process = await asyncio.create_subprocess_exec("systemd-tmpfiles", "--create", plans.TMPFILES)
    if await process.wait():
        raise HeadgateError(f"systemd-tmpfiles --create {plans.TMPFILES} failed", "its own lines above say why")


# --- what must be so ----------------------------------------------------------------------------------------------


def _see_systemd() -> None:
    if not os.path.isdir("/run/systemd/system"):
        raise CannotInstall(
            "this machine was not booted with systemd", "let what starts services here start `headgate run`"
        )
    if os.geteuid() != 0:
        raise CannotInstall("only root may install a service", "use sudo")


def _unit_name(text: str) -> str:
    unit = text if text.endswith(".service") else f"{text}.service"
    if not re.fullmatch(r"[\w:.\\@-]+\.service", unit):
        raise typer.BadParameter(f"{text!r} is no name of a service; write app@.service")
    return unit


async def _see_application(unit: str, settings: Settings) -> None:
    """See that systemd knows the unit, and that nothing of its own would stop the server before ours is asked."""
    instance = unit.replace("@.", "@headgate.")  # of a template itself systemd says nothing
    _, said = await systemctl(_ANSWER, "show", "-p", "LoadState,ExecStop,TimeoutStopUSec", "--", instance)
    lines = [line.partition("=") for line in said.splitlines()]
    values = {name: value for name, _, value in lines}
    if values.get("LoadState") != "loaded":
        raise CannotInstall(f"systemd calls {unit} {values.get('LoadState', said)}", "name a service that it knows")
    if any(name == "ExecStop" and _OURS not in f"{value} " for name, _, value in lines):
        remedy = f"take it out (KillSignal= says how a service is told to stop), and see `systemctl cat {instance}`"
        raise CannotInstall(
            f"{unit} has an ExecStop of its own, which would stop the server before it is drained", remedy
        )
    longest = max(tables.drain.timeout for tables in (settings.defaults, *settings.upstream.values()))
    limit = seconds(values.get("TimeoutStopUSec", ""))
    if limit is not None and limit <= longest:
        print(f"note: systemd lets {unit} drain for {limit:g} s (TimeoutStopSec), headgate.toml for {longest:g} s")


def _see_released(settings: Settings) -> None:
    """See that nginx does not need what is about to go: with its socket's directory missing it would not start."""
    if os.path.exists(settings.nginx.conf):
        written = [each.path for each in adopt.release(settings).writes if isinstance(each, FileEdit)]
        if written:
            raise CannotInstall(f"nginx is adopted still: {', '.join(written)}", "run `headgate release` first")


def _forget(purge: bool, yes: bool) -> None:
    """Delete what the service leaves behind, as far as that is wished."""
    left = [plans.RUNTIME]
    if purge or (os.path.isdir(plans.STATE) and not yes and typer.confirm(f"Delete {plans.STATE}, its history, too?")):
        left.append(plans.STATE)
    for directory in filter(os.path.isdir, left):
        shutil.rmtree(directory)
        print(f"{directory} is gone")
