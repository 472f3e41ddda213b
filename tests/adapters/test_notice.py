"""Outgoing notices, to real consumers of every kind: who acknowledges, who fails, who hangs, who leads elsewhere."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from controller.adapters import notice as adapter
from controller.adapters.notice import Notice, notify
from controller.core.events import RunStep
from controller.core.model import Group, Server, StepName, Upstream
from controller.core.policy import NoticePolicy, Policy
from controller.ports import Check
from controller.stages import carry_out
from tests.support.peer import Behave, Peer, answers, hangs, peer, status, trickles

NOTICE = Notice("app", "web:8001@127.0.0.1", "127.0.0.1", 8001, "c0ffee", 1795171498.5)
OK = b"HTTP/1.1 204 No Content\r\n\r\n"


@dataclass
class Consumer:
    """What one consumer was told: `(path, body)` for each request it has read whole."""

    peer: Peer

    @property
    def url(self) -> str:
        return f"{self.peer.url}/notices"

    @property
    def told(self) -> list[tuple[str, dict[str, object]]]:
        return [(told.line.split()[1], json.loads(told.body)) for told in self.peer.told]


@contextlib.asynccontextmanager
async def consumer(behave: Behave) -> AsyncIterator[Consumer]:
    async with peer(behave) as known:
        yield Consumer(known)


def policy(*consumers: str, tries: int = 3, timeout: float = 0.2, deadline: float = 5.0) -> NoticePolicy:
    return NoticePolicy(True, consumers, tries, timeout, deadline)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "BACK_OFF", (0.01, 0.02))


@pytest.fixture
def nobody() -> str:
    """A URL where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"http://127.0.0.1:{sock.getsockname()[1]}/"


async def test_every_consumer_gets_the_notice_as_json() -> None:
    async with consumer(answers(OK)) as first, consumer(answers(status(200))) as second:
        assert await notify(policy(first.url, second.url), NOTICE) == "2 of 2 consumers acknowledged"
    for each in (first, second):
        assert each.told == [
            (
                "/notices",
                {
                    "event": "offline",
                    "upstream": "app",
                    "server": "web:8001@127.0.0.1",
                    "host": "127.0.0.1",
                    "port": 8001,
                    "id": "c0ffee",
                    "at": 1795171498.5,
                },
            )
        ]


async def test_a_consumer_that_acknowledges_the_third_try_was_told_the_same_each_time() -> None:
    async with consumer(answers(status(500), b"", OK)) as third:
        assert await notify(policy(third.url), NOTICE) == "1 of 1 consumers acknowledged"
    assert len(third.told) == 3
    assert third.told[0] == third.told[1] == third.told[2]


async def test_each_consumers_fault_is_named_and_keeps_nobody_else_from_being_told(nobody: str) -> None:
    async with (
        consumer(answers(OK)) as well,
        consumer(answers(status(503))) as sick,
        consumer(answers(b"")) as closing,
        consumer(answers(b"it is late\r\n\r\n")) as odd,
        consumer(hangs) as hanging,
    ):
        said = await notify(policy(well.url, sick.url, closing.url, odd.url, hanging.url, nobody), NOTICE)
    first, *faults = said.split("; ")
    assert first == "1 of 6 consumers acknowledged"
    assert faults[0] == f"{sick.url}: answered 503 after 3 tries"
    assert faults[1] == f"{closing.url}: closed without an answer after 3 tries"
    assert faults[2].startswith(f"{odd.url}: ")
    assert faults[2].endswith(" after 3 tries")
    assert faults[3] == f"{hanging.url}: no answer within 0.2 s after 3 tries"
    assert faults[4] == f"{nobody}: refused after 3 tries"
    assert [len(each.told) for each in (well, sick, closing, hanging)] == [1, 3, 3, 3]


async def test_redirects_are_not_followed() -> None:
    async with (
        consumer(answers(OK)) as other,
        consumer(answers(status(307, f"Location: {other.url}\r\n"))) as leading,
    ):
        said = await notify(policy(leading.url, tries=1), NOTICE)
    assert said == f"0 of 1 consumers acknowledged; {leading.url}: answered 307 after 1 try"
    assert other.told == []


@pytest.mark.parametrize("behave", [hangs, trickles])
async def test_the_deadline_holds_whatever_a_consumer_does(behave: Behave) -> None:
    async with consumer(behave) as slow, consumer(answers(OK)) as quick:
        began = time.monotonic()
        said = await notify(policy(slow.url, quick.url, timeout=600, deadline=0.3), NOTICE)
        took = time.monotonic() - began
    assert said == f"1 of 2 consumers acknowledged; {slow.url}: no answer within 0.3 s"
    assert took < 60, "far below the time-out of a try"


async def test_a_consumer_that_trickles_does_not_outlive_the_time_of_a_try() -> None:
    async with consumer(trickles) as slow:
        said = await notify(policy(slow.url, tries=1, timeout=0.2, deadline=600), NOTICE)
    assert said.endswith(f"{slow.url}: no answer within 0.2 s after 1 try")


async def test_nobody_is_told_once_notices_are_switched_off() -> None:
    async with consumer(answers(OK)) as told:
        assert await notify(replace(policy(told.url), enabled=False), NOTICE) == "notices have been switched off"
    assert told.told == []


async def test_what_is_secret_in_a_url_is_not_recorded(nobody: str) -> None:
    url = nobody.replace("//", "//me:secret@") + "hook?token=secret"
    said = await notify(policy(url, tries=1), NOTICE)
    assert said == f"0 of 1 consumers acknowledged; {nobody}hook: refused after 1 try"


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:99999/", "http://no-such-host.invalid/"])
async def test_a_url_that_leads_nowhere_is_said_to(url: str) -> None:
    said = await notify(policy(url, tries=1, timeout=5), NOTICE)
    assert said.startswith(f"0 of 1 consumers acknowledged; {url}: ")
    assert said.endswith(" after 1 try")


async def test_the_step_of_a_change_tells_of_its_server_and_records_the_sentence() -> None:
    server = Server("unix:/run/a.sock", "unix:/run/a.sock", "unix:/run/a.sock", 0)
    async with consumer(answers(OK)) as told:
        notices = policy(told.url)
        group = Group(Upstream("app", (server,), policy=Policy(notices=notices)), {})  # no process is driven
        job = RunStep(7, 2, StepName.NOTIFY, "app", server.key)
        done = await carry_out(job, group, Check(), None, 12.5)  # type: ignore[arg-type]
    assert (done.change, done.step, done.detail) == (7, 2, "1 of 1 consumers acknowledged")
    ((_, body),) = told.told
    assert (body["server"], body["host"], body["port"], body["at"]) == (server.key, "unix:/run/a.sock", 0, 12.5)
    assert body["id"]
    gone = await carry_out(replace(job, server="127.0.0.1:9"), group, Check(), None, 12.5)  # type: ignore[arg-type]
    assert gone
    assert gone.detail == "nobody was told, for it is gone from nginx.conf"
