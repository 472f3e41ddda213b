"""Hooks: requests and commands around a change, such as those that take a server out of a service registry.

Which there are is said in the settings, when they are called is decided in controller/core. Secrets are read here, for
each call, and stand in nothing that is logged or recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import aiohttp

from controller.adapters import outgoing
from controller.adapters.launch import OURS
from controller.adapters.pidfd import readable
from controller.core.model import Server
from controller.core.policy import Hook
from controller.ports import HookError

BACK_OFF = (0.1, 2.0)
"""Seconds before the second try, twice as long before each further one, and at most."""
_SECRET = 65_536  # bytes that a file with a secret may have
_PRINTED = 200  # characters of a command's output in an error
_KILL_WAIT = 5.0  # seconds that a killed command may take to vanish


class _Failed(Exception):
    """What went wrong with one hook, without secrets."""


async def call(hooks: Sequence[Hook], upstream: str, server: Server) -> str:
    """Call them one after the other for this server, and return a sentence for each.

    HookError at the first that fails where its `on_failure` is `abort`. Each ends in time, whatever is called does: a
    try of a request has `timeout` seconds, a command is killed after as many.
    """
    said: list[str] = []
    for hook in hooks:
        texts = _Texts(upstream, server)
        try:
            said.append(await (_run(hook, texts) if hook.command else _ask(hook, texts)))
        except _Failed as failed:
            what = shlex.join(texts.shown(word) for word in hook.command) or _name(hook.requests[0], texts)
            fault = texts.hidden(f"{what} {failed}")
            if hook.on_failure == "abort":
                remedy = f"mend what it calls, or [upstream.{upstream}.hooks], or insist with --force"
                raise HookError("; ".join([*said, fault]), remedy) from None
            said.append(f"{fault}; proceeding as on_failure says")
    return "; ".join(said) or "hooks have been taken out of the settings"


class _Texts:
    """Fills placeholders for one server, and knows the secrets that it has filled in."""

    _HOLE = re.compile(r"\{(?:(upstream|address|host|port)|(env|file):([^{}]+))\}")
    _AUTHORITY = re.compile(r"(https?://(?:\{[^{}]*\}|[^{}/?#])*)(.*)", re.DOTALL)

    def __init__(self, upstream: str, server: Server) -> None:
        self._values = {
            "upstream": upstream,
            "address": server.address,
            "host": server.ip,
            "port": str(server.port),
        }
        self._secrets: set[str] = set()

    def filled(self, text: str, quoted: Callable[[str], str] = str) -> str:
        """`text` with everything in its place; _Failed where a secret is missing."""

        def value(hole: re.Match[str]) -> str:
            if hole[1]:
                return quoted(self._values[hole[1]])
            secret = self._secret(hole[2], hole[3])
            return secret if quoted is str else _encoded(secret)

        return self._HOLE.sub(value, text)

    def url(self, text: str, fill: Callable[[str, Callable[[str], str]], str] | None = None) -> str:
        """The same for a URL: values are encoded, and an IPv6 address stands in brackets where a host does."""
        fill = fill or self.filled
        match = self._AUTHORITY.fullmatch(text)
        origin, path = match.groups() if match else (text, "")
        return fill(origin, _in_origin) + fill(path, _encoded)

    def shown(self, text: str, quoted: Callable[[str], str] = str) -> str:
        """`text` with its secrets as they are written: by name."""
        return self._HOLE.sub(lambda hole: quoted(self._values[hole[1]]) if hole[1] else hole[0], text)

    def hidden(self, text: str) -> str:
        """`text` without any secret that has been filled in."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    def _secret(self, kind: str, name: str) -> str:
        if kind == "env":
            secret = os.environ.get(name, "")
            if not secret:
                raise _Failed(f"was not called: the daemon's environment has no {name}")
        else:
            try:
                if not Path(name).is_file():
                    raise _Failed(f"was not called: {name} is no file")
                with open(name, encoding="utf-8") as file:
                    secret = file.read(_SECRET).strip()
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is no text"
                raise _Failed(f"was not called: {name}: {why}") from None
        self._secrets |= {form for form in (secret, _encoded(secret)) if form}
        return secret


def _encoded(value: str) -> str:
    return quote(value, safe=":")


def _in_origin(value: str) -> str:
    """A server's value as it stands before the path of a URL."""
    try:
        return f"[{ipaddress.IPv6Address(value)}]"
    except ValueError:
        return quote(value, safe=":[]")


def _name(request: tuple[str, str], texts: _Texts) -> str:
    """A request without what may be secret in it."""
    method, url = request
    return f"{method} {outgoing.shown(texts.url(url, texts.shown))}"


# --- requests -----------------------------------------------------------------------------------------------------


async def _ask(hook: Hook, texts: _Texts) -> str:
    headers = {name: texts.filled(text) for name, text in hook.headers.items()}
    body = texts.filled(hook.body).encode() or None
    if body and "content-type" not in {name.lower() for name in headers}:
        headers["Content-Type"] = "application/json"
    requests = [(request, texts.url(request[1])) for request in hook.requests]
    wait, most = BACK_OFF
    async with outgoing.session(headers, skip_auto_headers=["Content-Type"]) as session:
        for tried in range(1, hook.tries + 1):
            faults = []
            for request, url in requests:
                answer = await _send(session, request[0], url, body, hook.timeout)
                if isinstance(answer, int) and any(low <= answer <= high for low, high in hook.statuses):
                    return f"{_name(request, texts)} answered {answer}"
                faults.append(f"answered {answer}" if isinstance(answer, int) else answer)
            if tried < hook.tries:
                await asyncio.sleep(wait)
                wait = min(wait * 2, most)
    raise _Failed(f"{', then '.join(faults)} after {hook.tries} {'try' if hook.tries == 1 else 'tries'}")


async def _send(session: aiohttp.ClientSession, method: str, url: str, body: bytes | None, timeout: float) -> int | str:
    """The status of the answer, or why there is none. Redirects are not followed: they lead to somebody else."""
    try:
        async with asyncio.timeout(timeout), session.request(method, url, data=body, allow_redirects=False) as response:
            return response.status
    except TimeoutError:
        return f"gave no answer within {timeout:g} s"
    except aiohttp.ServerDisconnectedError:
        return "closed without an answer"
    except ValueError:  # InvalidURL too; both may quote a secret
        return "cannot be asked: it is no URL, or a header holds a line break"
    except (aiohttp.ClientError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ECONNREFUSED:
            return "refused"
        text = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
        return "failed: " + (" ".join(text.split())[:120] or type(error).__name__)


# --- commands -----------------------------------------------------------------------------------------------------


async def _run(hook: Hook, texts: _Texts) -> str:
    words = [texts.filled(word) for word in hook.command]
    with tempfile.TemporaryFile() as output:  # a pipe would be held open by what the command leaves behind
        try:
            child = subprocess.Popen(  # noqa: ASYNC220 - one of asyncio's may be reaped before it can be killed safely
                words,
                env={name: value for name, value in os.environ.items() if name not in OURS},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise _Failed(f"cannot be run: {error}") from None
        code = await _end(child, hook.timeout)
        if code == 0:
            return f"{shlex.join(words)} succeeded"
        output.seek(max(0, output.tell() - _PRINTED))
        printed = " ".join(output.read().decode(errors="replace").split()) or "nothing"
    if code is None:
        how = f"did not end within {hook.timeout:g} s, and was killed"
    else:
        how = f"ended with exit status {code}" if code > 0 else f"was killed by signal {-code}"
    raise _Failed(f"{how}; it printed: {printed}")


async def _end(child: subprocess.Popen[bytes], timeout: float) -> int | None:
    """Its exit status; None where it had to be killed, with its process group, after `timeout` seconds."""
    descriptor = os.pidfd_open(child.pid)
    try:
        async with asyncio.timeout(timeout):
            await readable(descriptor)
        return child.wait()
    except TimeoutError:
        return None
    finally:
        if child.returncode is None:  # not reaped yet, so the group's number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_KILL_WAIT):
                    await readable(descriptor)
            child.poll()
        os.close(descriptor)
