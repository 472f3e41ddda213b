"""Units: what can be said without systemd, and the whole order of going offline under a real one."""
# ruff: noqa: ASYNC240 - a test may block its own loop

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.adapters.process import Processes
from controller.core.policy import ProcessPolicy
from controller.ports import ProcessError
from tests.support.container import PYTHON, ROOT, Container, missing, wheelhouse
from tests.support.gunicorn import free_port, tcp

GUNICORN = f"""\
    [Service]
    Type=notify
    WorkingDirectory=/srv
    Environment=HEADGATE_TEST_SEEN=/run/seen-%i
    ExecStart={PYTHON} -m gunicorn --bind 127.0.0.1:%i --workers 2 --worker-class uvicorn_worker.UvicornWorker \\
        --graceful-timeout 20 --no-control-socket apps:asgi
    Restart=always
    RestartSec=0
    KillMode=mixed
    TimeoutStopSec=30
"""
PLAIN = f"[Service]\nExecStart={PYTHON} -m http.server --bind 127.0.0.1 %i\n"
BROKEN = "[Service]\nExecStart=/bin/sh -c 'echo the database of %i is missing; exit 3'\n"
DEAF = "[Service]\nExecStart=/bin/sleep 1000\n"

# What every scenario begins with.
BEGIN = """
from controller.adapters.process import Processes
from controller.core.model import (Server)
from controller.core.policy import (ProcessPolicy)
from controller.ports import ProcessError
import os, pathlib, subprocess, time

def server(port):
    return Server(key=str(port), address=f"127.0.0.1:{port}", ip="127.0.0.1", port=port)

def state(port):
    return subprocess.run(["systemctl", "is-active", f"app@{port}"], capture_output=True, text=True).stdout.strip()

async def get(port, path="/"):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\\r\\nHost: test\\r\\nConnection: close\\r\\n\\r\\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    return answer[9:12] + " " + answer.rpartition("\\n")[2]

async def inside(port, path):
    seen = pathlib.Path(f"/run/seen-{port}")
    async with asyncio.timeout(10):
        while not (seen.exists() and path in seen.read_text().split()):
            await asyncio.sleep(0.02)

processes = Processes()
policy = ProcessPolicy(unit="app@{port}.service", start_timeout=20)
"""


@pytest.mark.parametrize("call", ["find", "start"])
async def test_without_systemd_a_unit_is_an_error_that_says_so(call):
    if Path("/run/systemd/system").exists():
        pytest.skip("systemd runs here")
    with pytest.raises(ProcessError, match=r"systemctl .*app@.*(no systemctl|not been booted with systemd)") as error:
        await getattr(Processes(), call)("app", tcp(free_port()), ProcessPolicy(unit="app@{port}.service"))
    assert "pid_file or start" in error.value.remedy


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    if reason := missing():
        if os.environ.get("HEADGATE_CONTAINERS") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    container = Container()
    try:
        container.install(wheelhouse(tmp_path_factory.mktemp("wheels")))
        container.copy(ROOT / "tests/support/apps.py", "/srv/apps.py")
        for name, text in (("app", GUNICORN), ("plain", PLAIN), ("broken", BROKEN), ("deaf", DEAF)):
            container.write(f"/etc/systemd/system/{name}@.service", text)
        container.run("systemctl", "daemon-reload")
        yield container
    finally:
        container.close()


@pytest.mark.container
@pytest.mark.timeout(600)
class TestUnderSystemd:
    def test_a_unit_is_started_found_told_to_finish_and_started_again(self, container):
        seen = container.python(
            BEGIN
            + """
assert await processes.find("app", server(8001), policy) is None
first = await processes.start("app", server(8001), policy)
main = subprocess.run(["systemctl", "show", "-p", "MainPID", "--value", "app@8001"], capture_output=True, text=True)
assert first.pid == int(main.stdout) and first.unit == "app@8001.service"
again = await processes.start("app", server(8001), policy)
assert (again.pid, again.created) == (first.pid, first.created)
slow = asyncio.ensure_future(get(8001, "/slow?2"))
await inside(8001, "/slow")
await processes.terminate(first, policy)
early = await processes.wait_exit(first, 0.2)
await processes.terminate(first, policy)
gone = await processes.wait_exit(first, 20)
answer = await slow
async with asyncio.timeout(10):
    while state(8001) != "inactive":
        await asyncio.sleep(0.05)
nothing = await processes.find("app", server(8001), policy)
second = await processes.start("app", server(8001), policy)
return [early, gone, answer, nothing, second.pid != first.pid, await get(8001)]
"""
        )
        assert seen == [False, True, "200 done", None, True, "200 done"]

    def test_a_unit_that_hangs_is_killed_with_its_workers_and_stays_down(self, container):
        seen = container.python(
            BEGIN
            + """
master = await processes.start("app", server(8002), policy)
hanging = asyncio.ensure_future(get(8002, "/hang"))
await inside(8002, "/hang")
await processes.terminate(master, policy)
early = await processes.wait_exit(master, 0.5)
killed = await processes.kill(master, policy)
await asyncio.gather(hanging, return_exceptions=True)
async with asyncio.timeout(10):
    while state(8002) not in ("inactive", "failed"):
        await asyncio.sleep(0.05)
again = await processes.kill(master, policy)
nothing = await processes.find("app", server(8002), policy)
return [early, killed[0] == master.pid, len(killed) >= 2, list(again), nothing]
"""
        )
        assert seen == [False, True, True, [], None]

    def test_a_unit_that_systemd_restarted_by_itself_is_left_alone_by_an_old_record(self, container):
        seen = container.python(
            BEGIN
            + """
old = await processes.start("app", server(8003), policy)
os.kill(old.pid, 9)
assert await processes.wait_exit(old, 20)
new = await processes.start("app", server(8003), policy)
await processes.terminate(old, policy)
killed = await processes.kill(old, policy)
return [new.pid != old.pid, list(killed), state(8003), await get(8003)]
"""
        )
        assert seen == [True, [], "active", "200 done"]

    def test_a_unit_that_is_no_gunicorn_is_its_main_process(self, container):
        seen = container.python(
            BEGIN
            + """
policy = ProcessPolicy(kind="systemd", unit="plain@{port}.service")
master = await processes.start("app", server(8004), policy)
assert (await processes.find("app", server(8004), policy)).pid == master.pid
await processes.terminate(master, policy)
return [await processes.wait_exit(master, 10), await processes.find("app", server(8004), policy)]
"""
        )
        assert seen == [True, None]

    def test_what_goes_wrong_with_a_unit_is_told(self, container):
        errors = container.python(
            BEGIN
            + """
async def error_of(port, unit, **more):
    try:
        return str(await processes.start("app", server(port), ProcessPolicy(unit=unit, start_timeout=2, **more)))
    except ProcessError as error:
        return str(error)

broken, deaf = await error_of(8005, "broken@{port}.service"), await error_of(8006, "deaf@{port}.service")
absent, held = await error_of(8007, "absent@{port}.service"), None
with subprocess.Popen([sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "8008"]) as other:
    try:
        async with asyncio.timeout(10):
            while not held:
                await asyncio.sleep(0.02)
                try:
                    await processes.find("app", server(8008), policy)
                except ProcessError as error:
                    held = str(error)
        refused = await error_of(8008, "app@{port}.service")
    finally:
        other.kill()
async with asyncio.timeout(10):
    while subprocess.run(["systemctl", "is-active", "--quiet", "deaf@8006"]).returncode == 0:
        await asyncio.sleep(0.05)
return [broken, deaf, absent, held == refused, held]
"""
        )
        broken, deaf, absent, same, held = errors
        assert same
        assert "127.0.0.1:8005 stopped (unit broken@8005.service) before it listened" in broken
        assert "the database of 8005 is missing" in broken
        assert "127.0.0.1:8006 did not listen within 2 s" in deaf
        assert "unit absent@8007.service cannot be used: systemd calls it not-found" in absent
        assert "http.server" in held
        assert "unit app@8008.service does not run" in held
