"""The same rollout on plain nginx, without the Lua module: by edited weights, `down` marks and verified reloads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from controller.demo.stage import UPSTREAM, Stage, until
from tests.e2e.test_faults import who


@pytest.mark.timeout(300)
def test_a_rollout_by_reloads_loses_no_request_of_one_shot_clients_and_leaves_the_file_as_it_was() -> None:
    with Stage("gthread", warm_up=4.0, data_plane="reload") as stage:
        conf = stage.prefix / "nginx.conf"
        written = conf.read_bytes()
        before = {address: stage.master(address) for address in stage.addresses}
        workers = stage.nginx_workers()
        load = stage.load(60, "--mix", "fast=9,echo=1,slow=0.1", "--one-shot", "1")
        change = stage.client.begin_change("rollout", UPSTREAM)
        log = stage.prefix / "headgate.log"
        until(lambda: stage.client.change(change, wait=1)["status"] != "running", "the rollout", 200, log)
        record = stage.client.change(change)
        summary = load.finish()
        assert record["status"] == "done", record["error"]
        assert summary["failures"] == {}, summary
        assert summary["requests"] > 500
        assert all(stage.master(address) != before[address] for address in stage.addresses)
        assert not stage.nginx_workers() & workers, "it was by reloads"
        until(
            lambda: conf.read_bytes() == written, "the last ramp's end, with the file as its author wrote it", 30, log
        )
        assert "files have changed" not in log.read_text(), "our own writes are no news"


def test_a_server_line_is_changed_in_the_file_and_in_the_traffic() -> None:
    with Stage("gthread", warm_up=0.0, data_plane="reload") as stage:
        conf, log = stage.prefix / "nginx.conf", stage.prefix / "headgate.log"
        heavy = stage.addresses[0]
        words = ("server", "set", UPSTREAM, heavy, "weight=8", "--yes")
        command = [sys.executable, "-m", "controller", "--config", str(stage.settings), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"server {heavy} weight=8;" in conf.read_text()

        def share() -> float:
            return [who(stage) for _ in range(40)].count(heavy) / 40

        until(lambda: share() > 0.6, "eight of ten requests for the heavy one", 20, log)
