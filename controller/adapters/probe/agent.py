"""Agent checks: one line of words that the server's agent says over TCP, as HAProxy asks for it."""

from __future__ import annotations

import asyncio
import re

from controller.adapters.probe.common import Endpoint, Fault, closed, connect, phrase
from controller.core.agent import said
from controller.core.model import Agent

LINE_LIMIT = 1024
"""Bytes of the line; a longer one is not taken."""


async def ask(endpoint: Endpoint) -> str:
    """The words of the first line, or of all that was said when the agent closes the connection."""
    loop = asyncio.get_running_loop()
    heard = b""
    with await connect(endpoint) as sock:
        if endpoint.check.send:
            await loop.sock_sendall(sock, endpoint.check.send.encode())
        while b"\n" not in heard:
            received = await loop.sock_recv(sock, LINE_LIMIT)
            heard += received
            if len(heard.partition(b"\n")[0]) > LINE_LIMIT:
                raise Fault("error", f"the agent's line is longer than {LINE_LIMIT} bytes")
            if not received:
                break
    if not heard:
        raise closed(begun=False)
    return phrase(heard.partition(b"\n")[0], LINE_LIMIT)


def verdict(words: str) -> tuple[str, str]:
    """Reason and phrase of events.ProbeResult for these words as a check of their own.

    They fail when they call the server down, and when none of them is known, for then this is no agent.
    """
    if down := said(Agent(), words)[0].down:
        return "status", f"the agent says {down}"[:120]
    if all(said(Agent(), word)[1] for word in re.split("[ ,]+", words.partition("#")[0]) if word):
        return "error", f"the agent says no word that is known: {words}"[:120]
    return "ok", words[:120]
