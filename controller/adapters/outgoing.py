"""What all calls to others by HTTP have in common: a session of their own, and URLs that may be shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import aiohttp


def session(headers: Mapping[str, str] = {}, **options: Any) -> aiohttp.ClientSession:
    """A session that keeps neither connections nor cookies; without a time limit unless `timeout` is given.

    Not requests in threads: a thread that reads byte after byte from a slow peer cannot be called back.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True, limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": "headgate", **headers},
        **{"timeout": aiohttp.ClientTimeout(total=None), **options},
    )


def shown(url: str) -> str:
    """The URL without what may be secret in it."""
    return re.sub("//[^/@]*@", "//", url).partition("?")[0]
