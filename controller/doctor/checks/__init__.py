"""All checks, and how they are run. Each is a function of the facts alone; what they have in common is in model.py."""

from __future__ import annotations

from controller.doctor.checks import balancing, plane, processes, proxying, reloading
from controller.doctor.model import Check, Facts, Finding, Severity

CHECKS: tuple[Check, ...] = tuple(
    each
    for module in (reloading, proxying, balancing, plane, processes)
    for each in vars(module).values()
    if isinstance(each, Check)
)
"""Every check, in the order in which findings of one severity are shown."""


def examine(facts: Facts) -> tuple[Finding, ...]:
    """Run every check; the gravest findings come first."""
    found = dict.fromkeys(
        Finding(check.id, each.severity or check.severity, each.subject, each.evidence, each.message, each.remedy)
        for check in CHECKS
        for each in check.find(facts)
    )
    return tuple(sorted(found, key=lambda finding: list(Severity).index(finding.severity)))
