"""The verb `doctor`: gathers the facts, runs the checks, shows what was found. It needs no daemon."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Annotated

import typer

from controller.cli_view import console
from controller.settings import DEFAULT_FILE, load


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    app.command()(doctor)


def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False,
) -> None:
    """Look for known traps in nginx, the servers and the settings; exit with 1 when one is severe."""
    from controller.doctor import checks, facts, report

    settings = load(context.obj)
    file = context.obj or os.environ.get("HEADGATE_CONFIG") or DEFAULT_FILE
    known = asyncio.run(facts.gather(settings, file))
    findings = checks.examine(known)
    if as_json:
        print(json.dumps(report.as_json(findings), indent=2))
    else:
        console().print(report.as_text(known, findings), soft_wrap=False)
    if any(finding.severity == "severe" for finding in findings):
        raise typer.Exit(1)
