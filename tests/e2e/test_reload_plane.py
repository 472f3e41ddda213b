"""The same rollout on plain nginx, without the Lua module: by edited weights, `down` marks and verified reloads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from controller.core.quantise import STEPS
from controller.demo.stage import UPSTREAM, Stage, free_ports, until
from tests.e2e.test_faults import command, who


def reloads_of(stage: Stage) -> int:
    """How often nginx has read its configuration again."""
    return (stage.prefix / "nginx.log").read_text().count(", reconfiguring")


@pytest.mark.timeout(300)
def test_a_rollout_by_reloads_loses_no_request_of_one_shot_clients_and_leaves_the_file_as_it_was() -> None:
    with Stage("gthread", warm_up=4.0, data_plane="reload") as stage:
        conf = stage.prefix / "nginx.conf"
        written = conf.read_bytes()
        before = {address: stage.master(address) for address in stage.addresses}
        workers, reloads = stage.nginx_workers(), reloads_of(stage)
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
        # For each server: one without it, one that lets it in again, and one for each stair above the first.
        assert reloads_of(stage) - reloads <= len(stage.addresses) * (2 + STEPS)
        assert "files have changed" not in log.read_text(), "our own writes are no news"


@pytest.mark.timeout(300)
def test_a_server_is_added_and_removed_by_reloads_without_a_failed_request_of_one_shot_clients() -> None:
    with Stage("gthread", warm_up=2.0, data_plane="reload") as stage:
        conf, log = stage.prefix / "nginx.conf", stage.prefix / "headgate.log"
        written = conf.read_bytes()
        new = f"127.0.0.1:{free_ports(1)[0]}"
        load = stage.load(60, "--mix", "fast=9,echo=1", "--one-shot", "1")
        for kind, changed in (("scale-out", True), ("scale-in", False)):
            *_, record = stage.client.follow_change(stage.client.begin_change(kind, UPSTREAM, (new,)))
            assert record["status"] == "done", record["error"]
            assert (f"server {new}".encode() in conf.read_bytes()) is changed
        summary = load.finish()
        assert summary["failures"] == {}, summary
        assert summary["requests"] > 100
        until(lambda: conf.read_bytes() == written, "the file as its author wrote it", 30, log)
        assert stage.master(new) is None
        assert "files have changed" not in log.read_text(), "our own writes are no news"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage("gthread", warm_up=0.0, data_plane="reload") as built:
        yield built


def line(stage: Stage, address: str) -> str:
    """The line of this server in nginx.conf."""
    lines = (stage.prefix / "nginx.conf").read_text().splitlines()
    return next(each.strip() for each in lines if each.strip().startswith(f"server {address}"))


def test_a_server_line_is_changed_in_the_file_and_in_the_traffic(stage: Stage) -> None:
    heavy, log = stage.addresses[0], stage.prefix / "headgate.log"
    workers = stage.nginx_workers()

    def most() -> bool:
        return [who(stage) for _ in range(40)].count(heavy) > 24

    def few() -> bool:
        return not most()

    for value, shown, share in (("8", f"server {heavy} weight=8;", most), ("", f"server {heavy};", few)):
        done = command(stage, "server", "set", UPSTREAM, heavy, f"weight={value}", "--yes")
        assert done.returncode == 0, done.stdout + done.stderr
        assert line(stage, heavy) == shown
        until(share, "its share of the requests", 20, log)
        assert not stage.nginx_workers() & workers
        workers = stage.nginx_workers()


def test_an_added_server_gets_no_request_before_it_is_probed(stage: Stage) -> None:
    conf, log = stage.prefix / "nginx.conf", stage.prefix / "headgate.log"
    good, picks = conf.read_text(), []
    healthy = threading.Event()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/who":
                picks.append(healthy.is_set())
            self.send_response(200 if self.path == "/who" or healthy.is_set() else 503)
            self.send_header("X-Served-By", "new")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as backend:
        thread = threading.Thread(target=backend.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            address = f"127.0.0.1:{backend.server_address[1]}"
            done = command(stage, "server", "add", UPSTREAM, address, "--yes")
            assert done.returncode == 0, done.stdout + done.stderr
            assert line(stage, address) == f"server {address} down;"
            for _ in range(30):
                who(stage)
            healthy.set()
            until(lambda: line(stage, address) == f"server {address};", "its first good probes", 20, log)
            until(lambda: who(stage) == "new", "its first request", 20, log)
            assert picks
            assert all(picks)
            done = command(stage, "server", "remove", UPSTREAM, address, "--yes")
            assert done.returncode == 0, done.stdout + done.stderr
            assert "new" not in {who(stage) for _ in range(12)}
            assert conf.read_text() == good
        finally:
            backend.shutdown()
            thread.join()


def test_what_is_set_under_maintenance_is_its_authors_when_that_ends(stage: Stage) -> None:
    first = stage.addresses[0]
    stage.client.set_admin(UPSTREAM, first, "maint")
    assert line(stage, first) == f"server {first} down;"
    done = command(stage, "server", "set", UPSTREAM, first, "down", "weight=3", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{first} of {UPSTREAM}: down, as soon as Headgate's own down goes" in done.stdout
    stage.client.set_admin(UPSTREAM, first, "ready")
    assert line(stage, first) == f"server {first} down weight=3;"
    assert first not in {who(stage) for _ in range(12)}
    done = command(stage, "server", "set", UPSTREAM, first, "down", "--yes")
    assert (done.returncode, done.stdout) == (0, "there is nothing to do: the line says so already\n")
    done = command(stage, "server", "set", UPSTREAM, first, "down=", "weight=", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert line(stage, first) == f"server {first};"
    log = stage.prefix / "headgate.log"
    until(lambda: first in {who(stage) for _ in range(12)}, "its requests", 20, log)


def test_a_parameter_that_only_nginx_knows_is_loaded_by_one_reload(stage: Stage) -> None:
    first = stage.addresses[0]
    revision, workers = stage.client.status()["revision"], stage.nginx_workers()
    for value, shown in (
        ("fail_timeout=7s", f"server {first} fail_timeout=7s;"),
        ("fail_timeout=", f"server {first};"),
    ):
        done = command(stage, "server", "set", UPSTREAM, first, value, "--yes")
        assert done.returncode == 0, done.stdout + done.stderr
        assert line(stage, first) == shown
        assert not stage.nginx_workers() & workers
        assert stage.client.status()["revision"] == revision
        workers = stage.nginx_workers()


def test_lines_edited_by_hand_join_and_leave_without_a_reload_by_hand(stage: Stage) -> None:
    conf, log = stage.prefix / "nginx.conf", stage.prefix / "headgate.log"
    good = conf.read_text()
    first, second = stage.addresses[:2]
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    load = stage.load(80, "--mix", "fast=9,echo=1", "--one-shot", "1")
    stage.start_server(address)
    try:
        conf.write_text(good.replace(f"server {first};", f"server {first}; server {address};"))
        until(lambda: address in {who(stage) for _ in range(12)}, "requests at the new server", 30, log)
        conf.write_text(good.replace(f"server {second};", f"server {second} down;"))

        def left() -> bool:
            return not {address, second} & {who(stage) for _ in range(12)}

        until(left, "one to leave with its line, one by its mark", 30, log)
        done = command(stage, "drain", UPSTREAM, second, "--wait")
        assert done.returncode == 0, done.stdout + done.stderr
        assert second not in {who(stage) for _ in range(12)}
        stage.client.set_admin(UPSTREAM, second, "ready")
    finally:
        conf.write_text(good)
    until(lambda: second in {who(stage) for _ in range(12)}, "its return", 30, log)
    summary = load.finish()
    assert summary["failures"] == {}, summary
    assert summary["requests"] > 0
