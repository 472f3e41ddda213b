"""Notices to Headgate's daemon over the unix socket of its API."""

from __future__ import annotations

import http.client
import json
import socket
import time
import uuid
from dataclasses import dataclass
from typing import Any

SOCKET = "/run/headgate/api.sock"
"""Where the daemon listens, unless `[api] socket` says otherwise."""

ANSWER_SECONDS = 8.0
"""How long an answer may take beyond what the call itself waits for: nginx has to take a table first."""

_SLICE = 15.0


class Unheard(Exception):
    """The daemon was not reached, or refused; the text says why, and what helps. `code` is that of its error answer."""

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Left:
    """How going offline went: whether every request at the server had ended, and the seconds that it took."""

    empty: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Headgate:
    """The daemon behind this unix socket. `upstream` None stands for every upstream that has the server."""

    socket: str = SOCKET
    upstream: str | None = None

    def online(self, server: str) -> None:
        """Say that `server` is there again: it is probed at once, whatever an earlier notice said; Unheard."""
        self._post("/v1/online", {"server": server, "upstream": self.upstream}, 0.0)

    def offline(self, server: str, wait: float, why: str = "") -> Left:
        """Say that `server` goes; return when nginx chooses it no more and has no request there, or when `wait` seconds
        are over. Unheard when the daemon cannot be told; once it has been, nginx keeps to it without the daemon.
        """
        begun = time.monotonic()
        notice = {"server": server, "upstream": self.upstream, "id": str(uuid.uuid4()), "seconds": None, "why": why}
        told = False
        while True:
            left = max(0.0, wait - (time.monotonic() - begun))
            part = min(left, _SLICE) if told else 0.0  # so that a daemon that hangs is soon known
            try:
                answer = self._post("/v1/offline", notice | {"wait": part}, part)
            except Unheard:
                if not told:
                    raise
                time.sleep(min(left, 0.2))  # a daemon that is restarted meanwhile
            else:
                told = True
                if answer.get("drained"):
                    return Left(True, time.monotonic() - begun)
            if left == 0:
                return Left(False, time.monotonic() - begun)

    def _post(self, path: str, body: dict[str, Any], wait: float) -> dict[str, Any]:
        connection = _Connection(self.socket, wait + ANSWER_SECONDS)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read() or b"{}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unheard(f"no answer at {self.socket}: {reason}; does `headgate run` run, and may we ask?") from error
        finally:
            connection.close()
        if response.status != 200 or not isinstance(answer, dict):
            said = answer.get("error") if isinstance(answer, dict) else None
            if not isinstance(said, dict):
                raise Unheard(f"status {response.status} at {self.socket}")
            texts = filter(None, (said.get("message"), said.get("remedy")))
            raise Unheard("; ".join(texts), str(said.get("code", "")))
        return answer


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("headgate", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)  # close() closes it, connected or not
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
