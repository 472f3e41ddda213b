"""The shutdown flag for WSGI applications, whatever their framework and server."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from controller.integration import shutdown
from controller.integration.mark import BODY, ITSELF, MARK, Policy

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class Offline:
    """Middleware, outermost of all: `application = Offline(application)`.

    Until the flag is set it changes nothing. Afterwards responses carry the mark; whether new requests are refused says
    mark.Policy, whose fields are the options here. WSGI leaves the connection to the server, so nothing is said of it.
    """

    def __init__(
        self, app: WSGIApplication, *, address: str = ITSELF, refuse: bool = True, non_idempotent: bool = False
    ) -> None:
        self.app = app
        self._policy = Policy(address, refuse, non_idempotent)
        self._mark = (MARK, address)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer, pass on, or pass on and mark."""
        if shutdown.begun() and self._policy.refuses(environ["REQUEST_METHOD"]):
            _drop_body(environ)
            head = [("Content-Type", "text/plain"), ("Content-Length", str(len(BODY))), ("Retry-After", "1")]
            start_response("503 Service Unavailable", [*head, self._mark])
            return [BODY] if environ["REQUEST_METHOD"] != "HEAD" else []

        def marking(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            if shutdown.begun():
                headers = [*headers, self._mark]
            return start_response(status, headers, exc_info)

        return self.app(environ, marking)


def _drop_body(environ: WSGIEnvironment) -> None:
    """Read what the client sends: left unread it makes the kernel reset the connection, which can cost the answer."""
    left = math.inf if environ.get("wsgi.input_terminated") else int(environ.get("CONTENT_LENGTH") or 0)
    while left > 0 and (part := environ["wsgi.input"].read(int(min(left, 65536)))):
        left -= len(part)
