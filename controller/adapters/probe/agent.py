"""Agent checks: one line of words that the server's agent says over TCP, as HAProxy asks for it."""

from __future__ import annotations

import asyncio
import re

from controller.adapters.probe.common import Endpoint, Fault, closed, connect, phrase

LINE_LIMIT = 1024
"""Bytes of the line; a longer one is not taken."""


_DOWN = ("down", "fail", "stopped")
_WORD = re.compile("|".join(("[0-9]+%", "maxconn:[0-9]+", "ready", "drain", "maint", "up", *_DOWN)))


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
    words = phrase(heard.partition(b"\n")[0], LINE_LIMIT)
    if not any(map(_WORD.fullmatch, _split(words))):
        raise Fault("error", f"the agent says no word that is known: {words[:120]}")
    return words


def refusal(words: str) -> str:
    """The word by which the agent calls its server down, empty where it does not. The last one holds."""
    said = [word for word in _split(words) if word in ("up", *_DOWN)]
    return said[-1] if said and said[-1] in _DOWN else ""


def _split(words: str) -> list[str]:
    """What follows a `#` says why."""
    return re.split("[ ,]+", words.partition("#")[0].lower())
