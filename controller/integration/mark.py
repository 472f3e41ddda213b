"""What a server that goes offline says in its responses, and whom it refuses; asgi.py and wsgi.py carry it out."""

from __future__ import annotations

from dataclasses import dataclass

MARK = "X-Headgate-Offline"
"""The header that says: choose this server no more. nginx takes it out of the response."""

ITSELF = "1"
"""Its value where a server does not know by which address nginx knows it."""

NOT_REPEATED = frozenset({"POST", "LOCK", "PATCH"})
"""What nginx sends to no second server once a first one had it, unless `proxy_next_upstream` has `non_idempotent`."""

BODY = b"This server is going offline.\n"


@dataclass(frozen=True, slots=True)
class Policy:
    """How a server behaves once the shutdown flag is set.

    Every response that begins after the flag carries MARK with `address`. With `refuse`, requests that begin after it
    are answered 503, so that nginx sends them to another server; those that nginx would not send again are answered as
    ever, unless `non_idempotent` says that nginx is configured to.
    """

    address: str = ITSELF
    refuse: bool = True
    non_idempotent: bool = False

    def refuses(self, method: str) -> bool:
        """Whether a request that begins after the flag is answered 503."""
        return self.refuse and (self.non_idempotent or method not in NOT_REPEATED)
