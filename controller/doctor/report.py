"""Findings as people and programs read them. What is looked for and found does not belong here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from controller.doctor.checks import CHECKS
from controller.doctor.model import Facts, Finding, Severity

_PLACES = 5  # of one trap that are shown
_COLOURS = {Severity.SEVERE: "bold red", Severity.WARNING: "bold yellow", Severity.HINT: "bold cyan"}


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """How many findings of each severity, how many checks, and the findings."""
    return {**_counts(findings), "checks": len(CHECKS), "findings": [asdict(finding) for finding in findings]}


def as_text(facts: Facts, findings: Sequence[Finding]) -> RenderableType:
    """The findings by severity, each with evidence and remedy, and one line about what was looked at.

    One trap in several places is told once, with the first places.
    """
    return Group(*_groups(findings), _summary(facts, findings))


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    counted = Counter(finding.severity for finding in findings)
    return {severity.value: counted[severity] for severity in Severity}


def _groups(findings: Sequence[Finding]) -> Iterator[RenderableType]:
    for severity, grave in groupby(findings, lambda finding: finding.severity):
        yield Text(severity.upper(), _COLOURS[severity])
        for (check, message, remedy), same in groupby(grave, lambda each: (each.check, each.message, each.remedy)):
            places = list(same)
            yield _indented(2, (message, "bold"), (f"  [{check}]", "dim"))
            for each in places[:_PLACES]:
                yield _indented(4, each.subject, (f"  {each.evidence}", "dim"))
            if len(places) > _PLACES:
                yield _indented(4, (f"and in {len(places) - _PLACES} more places, which --json lists", "dim"))
            yield _indented(4, ("→ ", "green"), remedy)
        yield Text()


def _indented(columns: int, *parts: str | tuple[str, str]) -> Padding:
    return Padding(Text.assemble(*parts), (0, 0, 0, columns), expand=False)


def _summary(facts: Facts, findings: Sequence[Finding]) -> Text:
    found = ", ".join(f"{number} {severity}" for severity, number in _counts(findings).items() if number)
    nginx = facts.nginx.name if facts.nginx else "no nginx"
    looked = f"{nginx}, {_many(facts.upstreams, 'upstream')} and {_many(facts.apps, 'application')}"
    return Text(f"{found or 'nothing found'}; {len(CHECKS)} checks looked at {looked}")


def _many(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"
