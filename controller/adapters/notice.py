"""Outgoing notices: consumers are told over HTTP that a server goes offline (Sermant's notification by interface).

Whom to tell is said in the settings, when is decided in controller/core; what systemd is told stands in notify.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from dataclasses import asdict, dataclass

import aiohttp

from controller.adapters import outgoing
from controller.core.policy import NoticePolicy

BACK_OFF = (0.1, 1.0)
"""Seconds before the second try, twice as long before each further one, and at most."""


@dataclass(frozen=True, slots=True)
class Notice:
    """What is sent, as JSON. `host` and `port` are those of nginx's connection (`unix:/path` and 0 for a socket),
    `id` is the same in every try, `at` is seconds since the epoch."""

    upstream: str
    server: str
    host: str
    port: int
    id: str
    at: float


async def notify(policy: NoticePolicy, notice: Notice) -> str:
    """Tell all consumers at once, and return a sentence: how many acknowledged, and why the others did not.

    An answer of 2xx acknowledges; redirects are not followed, for they would take the notice to somebody else. Each
    try has `policy.timeout` seconds, everything together `policy.deadline`, whatever a consumer does.
    """
    if not policy.enabled:
        return "notices have been switched off"
    missing = dict.fromkeys(policy.consumers, f"no answer within {policy.deadline:g} s")
    count = len(missing)
    async with outgoing.session(timeout=aiohttp.ClientTimeout(total=policy.timeout)) as session:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(policy.deadline), asyncio.TaskGroup() as all_of_them:
                for url in tuple(missing):
                    all_of_them.create_task(_tell(session, url, policy, notice, missing))
    acknowledged = f"{count - len(missing)} of {count} consumers acknowledged"
    return "; ".join([acknowledged, *(f"{outgoing.shown(url)}: {why}" for url, why in missing.items())])


async def _tell(
    session: aiohttp.ClientSession, url: str, policy: NoticePolicy, notice: Notice, missing: dict[str, str]
) -> None:
    """Take the consumer out of `missing` once it has acknowledged; until then its last fault stands there."""
    wait, most = BACK_OFF
    for tried in range(1, policy.tries + 1):
        fault = await _post(session, url, policy, notice)
        if not fault:
            missing.pop(url, None)
            return
        missing[url] = f"{fault} after {tried} {'try' if tried == 1 else 'tries'}"
        if tried < policy.tries:
            await asyncio.sleep(wait)
            wait = min(wait * 2, most)


async def _post(session: aiohttp.ClientSession, url: str, policy: NoticePolicy, notice: Notice) -> str:
    """One try; what went wrong, or nothing."""
    try:
        async with session.post(url, json={"event": "offline", **asdict(notice)}, allow_redirects=False) as response:
            return "" if 200 <= response.status < 300 else f"answered {response.status}"
    except TimeoutError:
        return f"no answer within {policy.timeout:g} s"
    except aiohttp.ServerDisconnectedError:
        return "closed without an answer"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ECONNREFUSED:
            return "refused"
        return " ".join(str(error).split())[:120] or type(error).__name__
