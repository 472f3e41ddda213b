"""nginx's binary is replaced under traffic, as an upgrade of Debian's package does it, while servers are restarted."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator

import psutil
import pytest

from controller.demo.stage import UPSTREAM, Stage, until
from tests.e2e.test_faults import command, ready, wait, who


def master(stage: Stage) -> psutil.Process | None:
    """nginx's master as its pid file names it."""
    with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
        return psutil.Process(int((stage.prefix / "nginx.pid").read_text()))
    return None


@pytest.fixture
def stage() -> Iterator[Stage]:
    """A stage whose nginx has left its parent, as on a host; a child of ours would replace no binary."""
    with Stage("gthread", warm_up=1.0) as built:
        built.nginx.send_signal(signal.SIGTERM)
        built.nginx.wait(20)
        conf = built.prefix / "nginx.conf"
        conf.write_text(conf.read_text().replace("daemon off;", ""))
        arguments = ["-p", str(built.prefix), "-e", str(built.prefix / "nginx.log"), "-c", str(conf)]
        subprocess.run([built.nginx.args[0], *arguments], check=True, timeout=20)  # type: ignore[index]
        try:
            wait(built, "nginx is followed", lambda: ready(built))
            yield built
        finally:
            if last := master(built):
                last.terminate()
                last.wait(20)


@pytest.mark.slow
def test_a_restart_waits_for_the_old_workers_of_a_replaced_binary(stage: Stage) -> None:
    drained, restarted, _ = stage.addresses
    assert command(stage, "drain", UPSTREAM, drained, "--wait").returncode == 0
    # What a closing worker does to a kept connection in the moment in which it is used is nginx's own.
    load = stage.load(80, "--one-shot", "1")
    wait(stage, "traffic", lambda: load.read() and load.ticks)
    long = [subprocess.Popen(["curl", "-sf", "-o", "/dev/null", f"{stage.url}/slow?seconds=12"]) for _ in range(4)]
    try:
        wait(stage, "long requests", lambda: sum(s["in_flight"] for s in servers(stage)) >= len(long))
        old = master(stage)
        assert old is not None
        old.send_signal(signal.SIGUSR2)
        wait(stage, "a new master", lambda: (new := master(stage)) is not None and new != old)
        wait(stage, "its workers", stage.nginx_workers)
        old.send_signal(signal.SIGQUIT)
        assert command(stage, "restart", UPSTREAM, restarted).returncode == 0
        assert [process.poll() for process in long] == [0] * len(long), "the restart has waited for them"
        until(lambda: not old.is_running(), "the old master ends", 20, stage.prefix / "nginx.log")
        assert drained not in {who(stage) for _ in range(30)}, "the drain is still in force"
    finally:
        for process in long:
            process.kill()
            process.wait()
    summary = load.finish()
    assert summary["failures"] == {}, summary


def servers(stage: Stage) -> list[dict[str, int]]:
    (upstream,) = stage.client.status()["upstreams"]
    return list(upstream["servers"])
