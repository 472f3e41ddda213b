"""The API's client: requests over the unix socket or TCP, answers as the JSON of controller/api/wire.py."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

import requests
import requests_unixsocket

from controller.errors import ApiError, DaemonUnreachable

Json = dict[str, Any]

UNFINISHED = ("queued", "running", "paused", "aborting", "rolling-back")
"""The statuses of changes that go on."""

_READING = 20.0  # seconds that reading a large nginx.conf with host names may take
_PLANNING = 50.0  # seconds that the plan of a very large upstream may take
_TIMEOUT = 10.0  # seconds for an answer, beside the seconds that a call asks to wait
_PATIENCE = 30.0  # seconds that a restart of the daemon may take while somebody follows something
_SILENCE = 40.0  # seconds without even a comment after which an event stream counts as lost


class Client:
    """Calls the daemon at `base`: the path of its unix socket, or `http://host:port` with a token.

    Every call may raise DaemonUnreachable, or ApiError with the daemon's own code, message and remedy.
    """

    def __init__(self, base: str, token: str | None = None) -> None:
        self._where = base
        self._base = base if base.startswith("http://") else f"http+unix://{quote(base, safe='')}"
        self._session: requests.Session = requests_unixsocket.Session()  # type: ignore[no-untyped-call]
        self._session.trust_env = False  # a proxy of the environment is not meant for the daemon
        # A kept connection may be closed by the daemon at the moment of its re-use, and a wish is not sent twice.
        self._session.headers["Connection"] = "close"
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def status(self) -> Json:
        """Everything at a glance."""
        return self._call("GET", "/v1/status")

    def upstream(self, name: str) -> Json:
        """One upstream with its servers."""
        return self._call("GET", f"/v1/upstreams/{quote(name, safe='')}")

    def servers(self, upstream: str, server: str) -> list[Json]:
        """The servers that an address names; several for a host name."""
        answer = self._call("GET", f"/v1/upstreams/{quote(upstream, safe='')}/servers/{quote(server, safe='')}")
        return list(answer["servers"])

    def set_admin(self, upstream: str, server: str, admin: str, force: bool = False) -> Json:
        """Make a server `ready`, `drain` it, or put it under `maint`; `{"revision", "change"}` once nginx follows."""
        path = f"/v1/upstreams/{quote(upstream, safe='')}/servers/{quote(server, safe='')}/admin"
        return self._call("PUT", path, body={"admin": admin, "force": force})

    def in_flight(self, upstream: str, server: str, revision: int, wait: float) -> int:
        """Requests in flight at a server in nginx that serves `revision`: 0 at once, others after `wait` seconds."""
        path = f"/v1/upstreams/{quote(upstream, safe='')}/servers/{quote(server, safe='')}/in-flight"
        answer = self._call("GET", path, {"revision": revision, "wait": wait})
        return sum(each["in_flight"] for each in answer["servers"])

    def warm_up(self, upstream: str, server: str) -> Json:
        """Let a server warm up anew; `{"revision"}` once nginx follows."""
        return self._call("POST", f"/v1/upstreams/{quote(upstream, safe='')}/servers/{quote(server, safe='')}/warm-up")

    def offline(
        self,
        server: str,
        upstream: str | None = None,
        *,
        id: str = "",
        seconds: float | None = None,
        why: str = "",
        wait: float = 0,
    ) -> Json:
        """Announce that a server goes offline, in one upstream or in every one that has it.

        Returns, once nginx sends it nothing more and up to `wait` seconds later, what it still has in flight:
        `{"revision", "servers", "refused", "replayed", "drained"}`.
        """
        body = {"server": server, "upstream": upstream, "id": id, "seconds": seconds, "why": why, "wait": wait}
        return self._call("POST", "/v1/offline", body=body, timeout=_TIMEOUT + wait)

    def online(self, server: str, upstream: str | None = None) -> Json:
        """Announce that a server is there again; `{"revision"}` once nginx follows."""
        return self._call("POST", "/v1/online", body={"server": server, "upstream": upstream})

    def check(self, upstreams: tuple[str, ...] = (), timeout: float = _TIMEOUT) -> None:
        """Return if this edge takes traffic, with these upstreams or all; ApiError says why it does not."""
        self._call("GET", "/healthz/traffic", {"upstream": upstreams}, timeout=timeout)

    def edge(self) -> Json:
        """This edge host: `{"offline", "takes_traffic", "why", "connections"}`."""
        return self._call("GET", "/v1/edge")

    def set_edge(self, offline: bool) -> Json:
        """Take this edge host offline, or back; `{"offline", "takes_traffic", "why"}`."""
        return self._call("PUT", "/v1/edge", body={"offline": offline})

    def reread(self, meant: Sequence[Json] = ()) -> Json:
        """Have nginx.conf read again now; `{"revision", "warnings"}` once nginx follows.

        `meant` is what its author wants of parameters that stand there as Headgate wrote them.
        """
        body = {"meant": list(meant)} if meant else None
        return self._call("POST", "/v1/config/read", body=body, timeout=_TIMEOUT + _READING)

    def begin_change(
        self,
        kind: str,
        upstream: str,
        servers: tuple[str, ...] = (),
        batch: int | str | None = None,
        force: bool = False,
        *,
        max_unavailable: int | str | None = None,
        workers: int = 0,
        weight: int = 1,
        queue: bool = False,
        roll_back: bool | None = None,
    ) -> int:
        """Begin an operation and return the change's id.

        No servers means all; `batch` and `max_unavailable` are a number or `"50%"`. Without `batch` servers that go and
        come back do so one by one. `workers` belongs to a scale, `weight` to a scale-out. With `queue` it waits for the
        end of a change that is in its way. With `roll_back` it goes back when it fails; None: as the settings say.
        """
        body = {
            "kind": kind,
            "upstream": upstream,
            "servers": list(servers),
            "batch": batch,
            "force": force,
            "max_unavailable": max_unavailable,
            "workers": workers,
            "weight": weight,
            "queue": queue,
            "roll_back": roll_back,
        }
        return int(self._call("POST", "/v1/changes", body=body)["change"])

    def steer(self, change: int, wish: str) -> str:
        """`pause`, `resume` or `abort` a change; its status then."""
        return str(self._call("POST", f"/v1/changes/{change}/{wish}")["status"])

    def roll_back(self, change: int) -> int:
        """Roll a change back; the id of the change that does so: the same where it had not ended."""
        return int(self._call("POST", f"/v1/changes/{change}/roll-back")["change"])

    def plan(
        self,
        upstream: str,
        kind: str = "rollout",
        servers: tuple[str, ...] = (),
        batch: int | str = "",
        capacity: float | None = None,
        *,
        max_unavailable: int | str | None = None,
        workers: int = 0,
        force: bool = False,
        advise: bool = True,
    ) -> Json:
        """What an operation would do; nothing is begun. A large upstream takes a while."""
        query = {"kind": kind, "servers": list(servers), "batch": str(batch), "capacity": capacity}
        query |= {"max_unavailable": max_unavailable, "workers": workers, "force": force, "advise": advise}
        path = f"/v1/upstreams/{quote(upstream, safe='')}/plan"
        return self._call("GET", path, query, timeout=_TIMEOUT + _PLANNING)

    def change(self, change: int, wait: float = 0, seen: int = -1) -> Json:
        """One change with its steps; waits up to `wait` seconds for news beyond version `seen`."""
        return self._call("GET", f"/v1/changes/{change}", {"wait": wait, "seen": seen}, timeout=_TIMEOUT + wait)

    def changes(self, limit: int = 50, before: int | None = None) -> list[Json]:
        """The newest changes first, without steps."""
        return list(self._call("GET", "/v1/changes", {"limit": limit, "before": before})["changes"])

    def events(self, after: int | None = None, limit: int = 200) -> list[Json]:
        """Events in order: those with an id above `after`, or the newest."""
        return list(self._call("GET", "/v1/events", {"after": after, "limit": limit})["events"])

    def traffic(
        self, upstream: str, since: float | None = None, until: float | None = None, step: int | None = None
    ) -> Json:
        """What each server got, in steps of `step` seconds, and what happened; times are seconds since the epoch."""
        values = {"upstream": upstream, "since": since, "until": until, "step": step}
        return self._call("GET", "/v1/traffic", values)

    def explain(self, upstream: str, server: str) -> Json:
        """Why a server gets what it gets: questions with sentences."""
        return self._call("GET", "/v1/explain", {"upstream": upstream, "server": server})

    def follow_change(self, change: int, every: float = 1.0) -> Iterator[Json]:
        """A change at each news of it, and every so many seconds without; ends with the change."""
        seen, patience = -1, _Patience()
        while True:
            try:
                record = self.change(change, every, seen)
            except DaemonUnreachable as error:
                patience.bear(error)
                continue
            patience = _Patience()
            seen = record["version"]
            yield record
            if record["status"] not in UNFINISHED:
                return

    def follow_events(self, after: int | None = None) -> Iterator[Json]:
        """Events as they come, for ever; none is missed or doubled when the daemon is restarted meanwhile."""
        patience = _Patience()
        while True:
            try:
                for event in self._stream(after):
                    after, patience = event["id"], _Patience()
                    yield event
            except DaemonUnreachable as error:
                patience.bear(error)

    def _stream(self, after: int | None) -> Iterator[Json]:
        headers = {"Accept": "text/event-stream"}
        if after is not None:
            headers["Last-Event-ID"] = str(after)
        response = self._send("GET", "/v1/events", headers=headers, stream=True, timeout=(_TIMEOUT, _SILENCE))
        with response:
            self._checked(response)
            try:
                for line in response.iter_lines(chunk_size=1):
                    if line.startswith(b"data: "):
                        yield json.loads(line.removeprefix(b"data: "))
            except requests.RequestException as error:
                raise self._unreachable(error) from error
        raise DaemonUnreachable(f"the event stream of {self._where} has ended", "the daemon was stopped")

    def _call(
        self, method: str, path: str, query: Json | None = None, body: Json | None = None, timeout: float = _TIMEOUT
    ) -> Json:
        response = self._send(method, path, params=query, json=body, timeout=timeout)
        return self._checked(response, decode=True)

    def _send(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            return self._session.request(method, self._base + path, allow_redirects=False, **options)
        except (requests.RequestException, OSError) as error:
            raise self._unreachable(error) from error

    def _checked(self, response: requests.Response, decode: bool = False) -> Json:
        try:
            answer: Json = response.json() if decode or not response.ok else {}
            if response.ok:
                return answer
            error = answer["error"]
            code, message, remedy = error["code"], error["message"], error["remedy"]
        except (ValueError, KeyError, TypeError) as fault:
            message = f"{self._where} answered {response.status_code} with something that is not Headgate's"
            raise ApiError(response.status_code, "unexpected", message, "is this the right socket?") from fault
        raise ApiError(response.status_code, code, message, remedy)

    def _unreachable(self, error: BaseException) -> DaemonUnreachable:
        number = _errno(error)
        if isinstance(error, requests.Timeout):
            return DaemonUnreachable(f"the daemon at {self._where} does not answer in time", "look at its log")
        if number in (errno.EACCES, errno.EPERM):
            return DaemonUnreachable(
                f"you may not open {self._where}", "use sudo, or join the group that the socket belongs to"
            )
        why = {errno.ENOENT: ": no such socket", errno.ECONNREFUSED: ": connection refused"}.get(number or 0, "")
        return DaemonUnreachable(
            f"no daemon answers at {self._where}{why}", "is `headgate run` running, with the same settings?"
        )


class _Patience:
    """How long somebody who follows something waits for the daemon to come back."""

    def __init__(self) -> None:
        self._since: float | None = None

    def bear(self, error: DaemonUnreachable) -> None:
        """Wait a little before the next try; raise the error when it has lasted too long."""
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since > _PATIENCE:
            raise error
        time.sleep(0.25)


def _errno(error: BaseException | None) -> int | None:
    """The number of the system's error that lies below the libraries' own."""
    seen = 0
    while error is not None and seen < 10:
        for each in (error, *error.args):
            if isinstance(each, OSError) and isinstance(each.errno, int):
                return each.errno
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None
