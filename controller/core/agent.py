"""What a backend says of itself, in the words of HAProxy's agent check: `75%,maxconn:30,ready,up`.

What is not mentioned stays: only the agent takes back what the agent said.
"""

from __future__ import annotations

import re
from dataclasses import replace

from controller.core.model import Admin, Agent

DOWN = frozenset({"down", "fail", "stopped"})
MOST = 256.0  # HAProxy's greatest weight; here, the greatest factor
_GAPS = re.compile(r"[ ,\t\r]+")
_WEIGHT = re.compile(r"([0-9]{1,9})%")
_MAX_CONNS = re.compile(r"maxconn:([0-9]{1,9})")


def said(agent: Agent, words: str) -> tuple[Agent, tuple[str, ...]]:
    """The agent's report after these words, and the words that mean nothing. The last word about a thing holds.

    Only the first line counts; what follows a `#` says why it is down.
    """
    line, _, why = words.lstrip().split("\n")[0].partition("#")
    unknown = []
    for word in filter(None, _GAPS.split(line.lower())):
        if word in list(Admin):
            agent = replace(agent, admin=Admin(word))
        elif word == "up":
            agent = replace(agent, down="")
        elif word in DOWN:
            agent = replace(agent, down=f"{word}: {why.strip()}" if why.strip() else word)
        elif found := _WEIGHT.fullmatch(word):
            agent = replace(agent, weight=min(int(found[1]) / 100, MOST))
        elif found := _MAX_CONNS.fullmatch(word):
            agent = replace(agent, max_conns=int(found[1]))
        else:
            unknown.append(word)
    return agent, tuple(unknown)


def describe(agent: Agent) -> str:
    """The report as a phrase: `drain, up, 75 % of its weight, at most 30 connections`."""
    parts = [agent.admin.value, agent.down or "up", f"{agent.weight:.0%} of its weight".replace("%", " %")]
    if agent.max_conns:
        parts.append(f"at most {agent.max_conns} connections")
    return ", ".join(parts)
