"""The verbs about this edge host as a whole: check, for the tier above, and edge, which takes it offline."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from controller.client import Client
from controller.errors import DaemonUnreachable, HeadgateError
from controller.settings import Settings, load


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(check)
    app.command()(edge)


def check(
    context: typer.Context,
    upstreams: Annotated[
        list[str] | None, typer.Option("--upstream", help="Only these upstreams count; all, without.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds that the daemon has to answer.")] = 2.0,
) -> None:
    """Exit with 0 while this edge host takes traffic: for keepalived's vrrp_script."""
    settings = load(context.obj)
    try:
        Client(settings.api.socket).check(tuple(upstreams or ()), timeout)
    except DaemonUnreachable as error:
        asyncio.run(_check_alone(settings, error, timeout))
        print(f"this edge takes traffic: nginx serves its last table by itself, but {error.message}")
    else:
        print("this edge takes traffic")


def edge(
    context: typer.Context,
    action: Annotated[Literal["drain", "enable"], typer.Argument(show_default=False)],
    wait: Annotated[
        bool, typer.Option("--wait", help="With drain: wait until no client is connected to nginx.")
    ] = False,
    settle: Annotated[
        float, typer.Option("--settle", min=0, help="Seconds that the tier above may take to look elsewhere.")
    ] = 15.0,
    timeout: Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait, with --wait.")] = 300.0,
) -> None:
    """Take this edge host offline: checks say no, traffic goes elsewhere, nginx serves what comes; or bring it back."""
    client = Client(load(context.obj).api.socket)
    began = time.monotonic()
    answer = client.set_edge(action == "drain")
    if action == "enable":
        print("this edge is online" if answer["takes_traffic"] else f"not yet: {'; '.join(answer['why'])}")
        return
    print("this edge is offline: checks are answered no; nginx goes on serving what comes", flush=True)
    shown = None
    while wait:
        connections, waited = client.edge()["connections"], time.monotonic() - began
        if waited >= settle and not connections:
            print(f"no client is connected after {waited:.0f} s; nginx may end")
            return
        if waited >= timeout:
            message = f"after {timeout:g} s {connections} client connections are left"
            raise HeadgateError(message, "this edge stays offline; stop nginx all the same, or wait again")
        if connections != shown:
            print(f"{connections} client connections", flush=True)
            shown = connections
        time.sleep(min(0.5, max(0.0, timeout - waited)))


async def _check_alone(settings: Settings, error: DaemonUnreachable, timeout: float) -> None:
    """Judge without the daemon, whose end leaves traffic alone: is the edge offline, and does nginx answer?"""
    from controller.adapters.edge import EdgeHost
    from controller.adapters.nginx.lua import LuaPlane
    from controller.adapters.nginx.verify import Reloader

    nginx = settings.nginx
    if await EdgeHost(settings.edge_mark, nginx.conf).offline():
        raise HeadgateError("this edge is offline by `headgate edge drain`", "`headgate edge enable` ends that")
    try:
        if nginx.data_plane == "lua":
            plane = LuaPlane(Path(nginx.control), Path(nginx.snapshot), timeout)
            try:
                await plane.status()
            finally:
                await plane.close()
        else:
            places = (Path(nginx.conf), Path(nginx.version_socket), Path(nginx.version_file))
            await Reloader(*places, timeout=timeout).served()
    except HeadgateError as silent:
        raise HeadgateError(f"{error.message}, and {silent.message}", silent.remedy) from error
