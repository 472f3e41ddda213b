"""Hooks, against real servers and programs of every kind: who answers, fails, hangs, trickles, leads elsewhere."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest

from controller.adapters import hooks as adapter
from controller.adapters.hooks import call
from controller.core.events import RunStep
from controller.core.model import Group, Server, StepName, Upstream
from controller.core.policy import Hook, HookPolicy, Policy, ProcessPolicy
from controller.ports import Check, HookError
from controller.stages import carry_out
from tests.support.peer import answers, hangs, peer, status, trickles

SERVER = Server("web:8001@127.0.0.1", "web:8001", "127.0.0.1", 8001)
V6 = Server("[::1]:8001", "[::1]:8001", "::1", 8001)


def asks(*urls: str, method: str = "POST", **parts: object) -> Hook:
    hook = Hook(tuple((method, url) for url in urls), timeout=0.3, tries=1)
    return replace(hook, **parts)  # type: ignore[arg-type]


def runs(*command: str, **parts: object) -> Hook:
    return replace(Hook(command=command, timeout=30.0), **parts)  # type: ignore[arg-type]


async def failure(*hooks: Hook, server: Server = SERVER) -> str:
    with pytest.raises(HookError) as raised:
        await call(hooks, "app", server)
    return raised.value.message


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "BACK_OFF", (0.01, 0.02))


@pytest.fixture
def nobody() -> str:
    """A URL where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"http://127.0.0.1:{sock.getsockname()[1]}/"


async def test_placeholders_are_filled_in_url_headers_and_body() -> None:
    async with peer(answers(status(200))) as called:
        hook = asks(
            called.url + "/{upstream}/{address}?at={host}&port={port}",
            headers={"X-Server": "{host}:{port}"},
            body='{"server": "{address}", "of": {"upstream": "{upstream}"}}',
        )
        said = await call([hook], "my app", SERVER)
    assert said == f"POST {called.url}/my%20app/web:8001 answered 200"
    (told,) = called.told
    assert told.line == "POST /my%20app/web:8001?at=127.0.0.1&port=8001"
    assert told.headers["x-server"] == "127.0.0.1:8001"
    assert told.headers["content-type"] == "application/json"
    assert told.body == '{"server": "web:8001", "of": {"upstream": "my app"}}'


async def test_an_ipv6_address_stands_in_brackets_only_where_a_host_does() -> None:
    async with peer(answers(status(200))) as called:
        await call([asks(f"{called.url}/?ip={{host}}", method="PATCH")], "app", V6)
    assert called.lines == ["PATCH /?ip=::1"]
    assert adapter._Texts("app", V6).url("http://{host}:{port}/a?b={host}") == "http://[::1]:8001/a?b=::1"
    assert adapter._Texts("app", V6).url("http://{address}/") == "http://[::1]:8001/"


async def test_secrets_come_from_environment_and_files_and_stand_in_no_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nobody: str
) -> None:
    (tmp_path / "token").write_text("s3cr&t/+token\n")
    monkeypatch.setenv("HOOK_PASSWORD", "pass word")
    token, password = f"{{file:{tmp_path}/token}}", "{env:HOOK_PASSWORD}"
    parts = {"headers": {"X-Token": token}, "body": password}
    async with peer(answers(status(200), status(500))) as called:
        url = called.url.replace("//", f"//me:{password}@") + f"/a/{token}/?token={token}"
        said = await call([asks(url, **parts)], "app", SERVER)
        failed = await failure(asks(url, asks(nobody).requests[0][1] + token, **parts))
    assert said == f"POST {called.url}/a/{token}/ answered 200"
    told = called.told[0]
    path, _, query = told.line.removeprefix("POST ").partition("?")
    assert (path.count("/"), unquote(path)) == (3, "/a/s3cr&t/+token/")
    assert parse_qs(query) == {"token": ["s3cr&t/+token"]}
    assert (told.headers["x-token"], told.body) == ("s3cr&t/+token", "pass word")
    assert told.headers["authorization"] == "Basic bWU6cGFzcyB3b3Jk"
    assert failed == f"POST {called.url}/a/{token}/ answered 500, then refused after 1 try"
    for secret in ("s3cr", "pass word", "pass%20word"):
        assert secret not in said + failed


async def test_a_secret_that_the_called_one_gives_back_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_TOKEN", "hunter2")
    async with peer(answers(b"HTTP/1.1 hunter2\r\n\r\n")) as called:
        failed = await failure(asks(called.url, headers={"X": "{env:HOOK_TOKEN}"}))
    assert "hunter2" not in failed
    assert "***" in failed


@pytest.mark.parametrize("value", ["a\nb", "a\r\nHost: elsewhere"])
async def test_a_secret_with_a_line_break_cannot_add_a_header(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HOOK_TOKEN", value)
    async with peer(answers(status(200))) as called:
        failed = await failure(asks(called.url, headers={"X": "{env:HOOK_TOKEN}"}))
    assert failed.endswith("it is no URL, or a header holds a line break after 1 try")
    assert called.told == []


async def test_a_missing_secret_is_named_and_nobody_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOK_TOKEN", raising=False)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    async with peer(answers(status(200))) as called:
        for hole, why in (
            ("env:HOOK_TOKEN", "the daemon's environment has no HOOK_TOKEN"),
            (f"file:{tmp_path}/gone", f"{tmp_path}/gone is no file"),
            (f"file:{tmp_path}/pipe", f"{tmp_path}/pipe is no file"),
            (f"file:{tmp_path}/bytes", f"{tmp_path}/bytes: it is no text"),
        ):
            failed = await failure(asks(called.url, headers={"X": f"{{{hole}}}"}))
            assert failed == f"POST {called.url} was not called: {why}"
    assert called.told == []


async def test_a_request_is_tried_again_until_its_status_fits() -> None:
    async with peer(answers(status(503), b"", status(404))) as called:
        hook = asks(f"{called.url}/x", method="DELETE", tries=5, statuses=((200, 299), (404, 404)))
        assert await call([hook], "app", SERVER) == f"DELETE {called.url}/x answered 404"
    assert called.lines == ["DELETE /x"] * 3


async def test_the_next_url_is_asked_where_one_does_not_answer_as_expected() -> None:
    async with peer(answers(status(404), status(500), status(200))) as called:
        said = await call([asks(*(f"{called.url}/{at}" for at in range(4)))], "app", SERVER)
    assert said == f"POST {called.url}/2 answered 200"
    assert called.lines == ["POST /0", "POST /1", "POST /2"]


async def test_each_fault_is_named(nobody: str) -> None:
    async with (
        peer(answers(status(500))) as sick,
        peer(answers(b"")) as closing,
        peer(hangs) as hanging,
        peer(trickles) as trickling,
    ):
        assert await failure(asks(sick.url, tries=2)) == f"POST {sick.url} answered 500 after 2 tries"
        assert await failure(asks(closing.url)) == f"POST {closing.url} closed without an answer after 1 try"
        for slow in (hanging, trickling):
            assert await failure(asks(slow.url)) == f"POST {slow.url} gave no answer within 0.3 s after 1 try"
    assert await failure(asks(nobody)) == f"POST {nobody} refused after 1 try"
    assert "failed: " in await failure(asks("http://no-such-host.invalid/", timeout=20))
    assert "is no URL" in await failure(asks("http://127.0.0.1:99999/"))


async def test_redirects_are_not_followed() -> None:
    async with (
        peer(answers(status(200))) as other,
        peer(answers(status(307, f"Location: {other.url}\r\n"))) as leading,
    ):
        assert await failure(asks(leading.url)) == f"POST {leading.url} answered 307 after 1 try"
    assert other.told == []


async def test_a_hook_that_may_fail_keeps_none_from_being_called_and_one_that_may_not_ends_the_step() -> None:
    async with peer(answers(status(500), status(200), status(500), status(200))) as called:
        hooks = [asks(f"{called.url}/{at}") for at in range(4)]
        failed = await failure(replace(hooks[0], on_failure="proceed"), *hooks[1:])
    assert called.lines == ["POST /0", "POST /1", "POST /2"]
    assert failed == (
        f"POST {called.url}/0 answered 500 after 1 try; proceeding as on_failure says; "
        f"POST {called.url}/1 answered 200; POST {called.url}/2 answered 500 after 1 try"
    )


async def test_a_command_gets_the_server_and_its_success_is_said(tmp_path: Path) -> None:
    code = f"import sys; open({str(tmp_path / 'seen')!r}, 'w').write(' '.join(sys.argv[1:]))"
    hook = runs(sys.executable, "-c", code, "{upstream}", "{address}", "{host}:{port}", "{}")
    said = await call([hook], "app", SERVER)
    assert said.endswith(" app web:8001 127.0.0.1:8001 '{}' succeeded")
    assert (tmp_path / "seen").read_text() == "app web:8001 127.0.0.1:8001 {}"


async def test_what_systemd_tells_the_daemon_is_no_business_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/ours")
    monkeypatch.setenv("HOOK_KEPT", "1")
    code = "import os, sys; sys.exit('NOTIFY_SOCKET' in os.environ or 'HOOK_KEPT' not in os.environ)"
    assert (await call([runs(sys.executable, "-c", code)], "app", SERVER)).endswith("succeeded")


async def test_a_command_that_fails_says_what_it_printed() -> None:
    failed = await failure(runs("sh", "-c", "echo no such registry >&2; exit 3"))
    assert failed.endswith(" ended with exit status 3; it printed: no such registry")
    assert (await failure(runs("sh", "-c", "kill -9 $$"))).endswith(" was killed by signal 9; it printed: nothing")
    assert "cannot be run: " in await failure(runs("/no/such/program"))


async def test_a_command_that_never_ends_is_killed_with_all_it_has_started(tmp_path: Path) -> None:
    # The shell and its child both hold a named pipe open, whose end is read when both are gone.
    os.mkfifo(tmp_path / "alive")
    alive = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    try:
        failed = await failure(
            runs("sh", "-c", f"exec 9>{tmp_path}/alive; echo begun; sleep 600 & sleep 600", timeout=1.0)
        )
        assert failed.endswith(" did not end within 1 s, and was killed; it printed: begun")
        os.set_blocking(alive, True)
        assert await asyncio.wait_for(asyncio.to_thread(os.read, alive, 1), 60) == b""
    finally:
        os.close(alive)


async def test_a_command_may_leave_something_behind_that_is_not_waited_for(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    said = await call([runs("sh", "-c", f"sleep 600 & echo $! > {pid}", timeout=60.0)], "app", SERVER)
    left = int(pid.read_text())
    try:
        assert said.endswith("succeeded")
        os.kill(left, 0)
    finally:
        os.kill(left, signal.SIGKILL)


async def test_a_command_dies_with_the_daemon_that_will_call_it_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "alive")
    hook = runs("sh", "-c", f"exec 9>{tmp_path}/alive; sleep 600", timeout=600.0)
    task = asyncio.create_task(call([hook], "app", SERVER))
    alive = await asyncio.to_thread(os.open, tmp_path / "alive", os.O_RDONLY)  # which waits until it is begun
    try:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.wait_for(asyncio.to_thread(os.read, alive, 1), 60) == b""
    finally:
        os.close(alive)


async def test_the_steps_of_a_change_call_their_own_hooks() -> None:
    async with peer(answers(status(200))) as called:
        policy = HookPolicy(*((asks(f"{called.url}/{name}"),) for name in ("before", "after", "up")))
        group = Group(Upstream("app", (SERVER,), policy=Policy(process=ProcessPolicy(), hooks=policy)), {})
        for at, name in enumerate((StepName.BEFORE_DRAIN, StepName.AFTER_DRAIN, StepName.AFTER_UP)):
            done = await carry_out(RunStep(7, at, name, "app", SERVER.key), group, Check(), None, 12.5)  # type: ignore[arg-type]
            assert (done.change, done.step) == (7, at)
            assert done.detail.endswith("answered 200")
    assert called.lines == ["POST /before", "POST /after", "POST /up"]
