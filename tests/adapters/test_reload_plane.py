"""What only the reload data plane has: files that go back, a budget, generations, people who edit at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from controller.adapters.nginx.files import DiskReader
from controller.adapters.nginx.reload import ReloadPlane
from controller.adapters.nginx.verify import version_include
from controller.adapters.nginx.writer import ConfWriter, Edit
from controller.conf.parse import parse
from controller.core.quantise import Pace
from controller.ports import PlaneRefused, PlaneUnreachable
from tests.lua.house import Backend, eventually, server, table, warm_up
from tests.support.edge import ReloadEdge, reload_edge
from tests.support.nginx import missing_parts

pytestmark = pytest.mark.skipif(missing_parts() is not None, reason=str(missing_parts()))


def drain(edge: ReloadEdge, *drained: int) -> list[dict[str, Any]]:
    return [server(each.port, state="drain" if at in drained else "up") for at, each in enumerate(edge.backends)]


class Meddling(ConfWriter):
    """A writer beside whom somebody else is at work: `before` runs before each transaction, `after` behind it."""

    before: Callable[[], object] = staticmethod(lambda: None)
    after: Callable[[], object] = staticmethod(lambda: None)

    async def apply(self, edits: Sequence[Edit]) -> None:
        self.before()
        await super().apply(edits)
        self.after()


def meddling(edge: ReloadEdge, **options: Any) -> tuple[ReloadPlane, Meddling]:
    made: list[Meddling] = []

    def writer(journal: Path, checker: Any) -> Meddling:
        made.append(Meddling(journal, checker))
        return made[0]

    return edge.made(writer, **options), made[0]


# --- files ------------------------------------------------------------------------------------------------------------


async def test_when_all_is_as_it_was_the_files_are_as_their_author_wrote_them() -> None:
    def lines(running: list[Backend]) -> str:
        first, second, third = (each.key for each in running)
        return f"server {first};server {second}   weight=02\tmax_fails=3 ; # odd\r\n server '{third}'\n max_fails=1\n;"

    async with reload_edge(3, lines) as edge:
        text = edge.conf.read_bytes()
        first, second, third = (each.port for each in edge.backends)
        ramp = warm_up(duration_ms=60_000)
        await edge.publish([server(first), server(second, weight=2), server(third, state="down", warm_up=ramp)])
        await edge.publish([server(first), server(second, state="drain", weight=2), server(third, warm_up=ramp)])
        assert b"weight=10" in edge.conf.read_bytes()
        await edge.publish([server(first, state="maint"), server(second, weight=2), server(third, state="down")])
        assert b"max_fails=0" in edge.conf.read_bytes()
        await edge.publish([server(first), server(second, weight=2), server(third)])
        assert edge.conf.read_bytes() == text
        assert (await edge.plane.status()).revision == 4


async def test_a_table_that_changes_no_line_costs_no_reload() -> None:
    async with reload_edge() as edge:
        await edge.publish(drain(edge))
        await edge.publish([server(each.port, state="quarantine") for each in edge.backends], fail_open=False)
        await edge.publish([server(each.port, state="maint") for each in edge.backends], fail_open=False)
        assert edge.reloads() == 2, "one for the first table of all, one for the marks"
        assert (await edge.plane.status()).revision == 3


async def test_a_configuration_that_nginx_refuses_stays_and_its_line_is_shown() -> None:
    async with reload_edge() as edge:
        await edge.publish(drain(edge))
        reloads = edge.reloads()
        edge.nginx.http += "\n    bogus on;"
        edge.nginx.write()
        text = edge.conf.read_bytes()
        with pytest.raises(PlaneRefused, match="unknown directive") as refused:
            await edge.publish(drain(edge, 0))
        assert refused.value.code == "write_failed"
        assert edge.conf.read_bytes() == text
        assert (edge.reloads(), (await edge.plane.status()).revision) == (reloads, 1)
        edge.nginx.http = edge.nginx.http.replace("bogus on;", "")
        edge.nginx.write()
        await edge.publish(drain(edge, 0))
        assert set(await edge.shares(6)) == {edge.backends[1].port}


async def test_a_file_that_cannot_be_parsed_is_refused_with_its_place() -> None:
    async with reload_edge() as edge:
        edge.conf.write_text(edge.conf.read_text() + "}")
        with pytest.raises(PlaneRefused, match=r'unexpected "}" in .*nginx\.conf:\d+') as refused:
            await edge.publish(drain(edge, 0))
        assert refused.value.code == "config"


async def test_when_the_proof_does_not_come_the_files_go_back() -> None:
    async with reload_edge() as edge:
        await edge.publish(drain(edge))
        text, master = edge.conf.read_bytes(), (await edge.reloader().master())[0]
        plane = edge.made(reloader=edge.reloader(timeout=0.5), patience=0.5)
        os.kill(master, signal.SIGSTOP)
        try:
            with pytest.raises(PlaneRefused, match="no new worker has come; everything was put back") as refused:
                await plane.publish(table(2, drain(edge, 0)))
        finally:
            os.kill(master, signal.SIGCONT)
        assert refused.value.code == "reload_failed"
        assert edge.conf.read_bytes() == text
        await plane.publish(table(3, drain(edge, 1)))
        assert set(await edge.shares(6)) == {edge.backends[0].port}


async def test_when_nginx_has_read_the_files_it_reads_them_again_after_they_went_back() -> None:
    async with reload_edge() as edge:
        await edge.publish(drain(edge))
        text, stuck, reloads = edge.conf.read_bytes(), edge.nginx.serving()[0], edge.reloads()
        plane, writer = meddling(edge, reloader=edge.reloader(timeout=1.0))
        applied: list[int] = []
        writer.after = lambda: os.kill(stuck, signal.SIGCONT) if applied else applied.append(1)
        os.kill(stuck, signal.SIGSTOP)
        try:
            with pytest.raises(PlaneRefused, match=r"old workers still accept.*put back"):
                await plane.publish(table(2, drain(edge, 0)))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stuck, signal.SIGCONT)
        assert edge.conf.read_bytes() == text
        assert edge.reloads() == reloads + 2
        assert (await plane.status()).revision == 1
        assert set(await edge.shares(10)) == {each.port for each in edge.backends}


# --- other people -----------------------------------------------------------------------------------------------------


async def test_an_edit_by_somebody_else_meanwhile_is_kept_and_the_table_planned_again() -> None:
    async with reload_edge() as edge:
        plane, writer = meddling(edge)
        edits = iter([b"# one\n"])

        def edit() -> None:
            with edge.conf.open("ab") as file:
                file.write(next(edits, b""))

        writer.before = edit
        assert (await plane.publish(table(1, drain(edge, 0)))).revision == 1
        assert edge.conf.read_bytes().endswith(b"# one\n")
        assert set(await edge.shares(6)) == {edge.backends[1].port}


async def test_somebody_who_takes_the_marks_out_again_and_again_is_not_fought() -> None:
    async with reload_edge() as edge:
        text = edge.conf.read_bytes()
        plane, writer = meddling(edge)
        writer.after = lambda: edge.conf.write_bytes(text)
        with pytest.raises(PlaneRefused, match="somebody else") as refused:
            await plane.publish(table(1, drain(edge, 0)))
        assert refused.value.code == "contended"
        assert edge.conf.read_bytes() == text
        assert edge.reloads() == 4
        assert (await plane.status()).revision == 0
        assert len(await edge.shares(6)) == 2


async def test_somebody_who_edits_all_the_time_is_not_fought() -> None:
    async with reload_edge() as edge:
        plane, writer = meddling(edge)
        writer.before = lambda: edge.conf.write_bytes(edge.conf.read_bytes() + b"# again\n")
        with pytest.raises(PlaneRefused) as refused:
            await plane.publish(table(1, drain(edge, 0)))
        assert refused.value.code == "contended"
        assert edge.reloads() == 0


async def test_after_a_quarrel_nginx_is_left_alone_for_a_while_and_then_the_table_comes_through() -> None:
    async with reload_edge() as edge:
        text = edge.conf.read_bytes()
        plane, writer = meddling(edge, patience=1.5)
        writer.after = lambda: edge.conf.write_bytes(text)
        with pytest.raises(PlaneRefused, match="somebody else"):
            await plane.publish(table(1, drain(edge, 0)))
        quarrel = time.monotonic()
        writer.after = lambda: None
        assert (await plane.publish(table(1, drain(edge, 0)))).revision == 1
        assert time.monotonic() - quarrel >= 1.4
        assert set(await edge.shares(6)) == {edge.backends[1].port}


async def test_a_version_that_somebody_put_back_is_not_taken_for_our_table() -> None:
    async with reload_edge() as edge:
        await edge.publish(drain(edge, 0))
        edge.version_file.write_bytes(version_include(edge.version_socket, "9-backup"))
        edge.nginx.reload()
        assert (await edge.plane.status()).revision == 0
        await edge.publish(drain(edge, 0))
        assert (await edge.plane.status()).revision == 2


async def test_without_its_memory_a_plane_goes_on_from_the_revision_that_nginx_serves() -> None:
    async with reload_edge() as edge:
        edge.revision = 40
        await edge.publish(drain(edge, 0))
        await edge.plane.close()
        edge.state.unlink()
        plane = edge.made()
        assert (await plane.status()).revision == 41
        with pytest.raises(PlaneRefused, match="not newer than 41"):
            await plane.publish(table(40, drain(edge)))


async def test_reloads_by_somebody_else_are_no_obstacle() -> None:
    async with reload_edge() as edge:
        plane, writer = meddling(edge)
        writer.before = writer.after = lambda: edge.nginx.process and edge.nginx.process.send_signal(signal.SIGHUP)
        await plane.publish(table(1, drain(edge, 0)))
        assert set(await edge.shares(6)) == {edge.backends[1].port}


async def test_a_new_line_does_not_serve_before_the_table_knows_it() -> None:
    async with reload_edge(3, lambda running: "".join(f"server {each.key};\n" for each in running[:2])) as edge:
        first, second, third = edge.backends
        await edge.publish([server(first.port), server(second.port)])
        edge.nginx.http = edge.nginx.http.replace(f"server {second.key};", f"server {second.key}; server {third.key};")
        edge.nginx.write()
        await edge.publish([server(first.port, weight=2.0), server(second.port)])
        assert set(await edge.shares(10)) == {first.port, second.port}
        await edge.publish([server(first.port), server(second.port), server(third.port)])
        assert set(await edge.shares(10)) == {first.port, second.port, third.port}


async def test_an_upstream_that_was_taken_out_is_no_obstacle() -> None:
    async with reload_edge() as edge:
        wanted = table(1, drain(edge, 0))
        wanted["upstreams"]["gone"] = wanted["upstreams"]["app"]
        assert (await edge.plane.publish(wanted)).revision == 1


async def test_an_upstream_that_came_into_a_file_which_held_none_is_found() -> None:
    async with reload_edge(2) as edge:
        site = edge.conf.parent / "site.conf"
        site.write_text("server { listen unix:site.sock; }\n")
        edge.conf.write_text(edge.conf.read_text().replace("http {", "http {\n include site.conf;\n", 1))
        await edge.publish(drain(edge))
        port = edge.backends[0].port
        site.write_text(f"upstream late {{ server 127.0.0.1:{port} weight=5; server 127.0.0.1:1; }}\n")
        both = table(2, drain(edge))
        both["upstreams"] |= table(2, [server(port, state="drain", weight=5), server(1)], name="late")["upstreams"]
        await edge.plane.publish(both)
        assert f"127.0.0.1:{port} weight=5 down" in site.read_text()


async def test_the_model_is_read_without_our_marks() -> None:
    async with reload_edge() as edge:
        assert isinstance(edge.plane, ReloadPlane)
        await edge.publish([drain(edge, 0)[0], server(edge.backends[1].port, warm_up=warm_up())])
        tree = parse(str(edge.conf), DiskReader())
        assert [line.down for line in tree.upstreams[0].servers] == [True, False]
        cleaned = edge.made().without_ours(tree).upstreams[0].servers
        assert [(line.down, line.weight) for line in cleaned] == [(False, 1), (False, 1)]


async def test_what_somebody_wrote_and_nginx_has_not_loaded_is_loaded_before_a_table_counts_as_served() -> None:
    async with reload_edge(3) as edge:
        first, *others = edge.backends
        await edge.publish(drain(edge))
        reloads = edge.reloads()
        edge.conf.write_text(edge.conf.read_text().replace(f"{first.key};", f"{first.key} down;"))
        assert len(await edge.shares(9)) == 3
        await edge.publish(drain(edge, 0))
        assert set(await edge.shares(9)) == {each.port for each in others}
        assert edge.reloads() == reloads + 1
        assert f"{first.key} down;" in edge.conf.read_text()
        await edge.publish([server(first.port, state="maint"), *drain(edge)[1:]])
        assert edge.reloads() == reloads + 1


async def test_a_line_that_somebody_took_out_is_out_of_nginx_when_the_table_without_it_is_served() -> None:
    async with reload_edge(3) as edge:
        await edge.publish(drain(edge))
        first, *others = edge.backends
        edge.conf.write_text(edge.conf.read_text().replace(f"server {first.key};", ""))
        await edge.publish(drain(edge)[1:])
        assert set(await edge.shares(9)) == {each.port for each in others}


async def test_a_plane_without_memory_reloads_once_for_nobody_knows_what_nginx_has_loaded() -> None:
    async with reload_edge(3) as edge:
        first, *others = edge.backends
        edge.conf.write_text(edge.conf.read_text().replace(f"{first.key};", f"{first.key} down;"))
        await edge.publish(drain(edge, 0))
        assert set(await edge.shares(9)) == {each.port for each in others}
        await edge.plane.close()
        edge.plane = edge.made()
        await edge.publish([server(first.port, state="maint"), *drain(edge)[1:]])
        assert edge.reloads() == 1


# --- budget -----------------------------------------------------------------------------------------------------------


async def test_tables_that_come_together_are_one_write_and_one_reload() -> None:
    async with reload_edge(pace=Pace(interval=1.0)) as edge:
        await edge.publish(drain(edge, 0))
        first, second = edge.backends
        tables = [
            table(number, [server(first.port, weight=float(number)), server(second.port)]) for number in range(2, 8)
        ]
        answers = await asyncio.gather(*(edge.plane.publish(each) for each in tables))
        assert {answer.revision for answer in answers} == {7}
        assert edge.reloads() == 2
        assert f"{first.key} weight=7;" in edge.conf.read_text()


async def test_reloads_keep_their_distance() -> None:
    async with reload_edge(pace=Pace(interval=0.7)) as edge:
        times = []
        for drained in (0, 1, 0):
            await edge.publish(drain(edge, drained))
            times.append(time.monotonic())
        assert all(later - earlier >= 0.6 for earlier, later in itertools.pairwise(times))


async def test_a_third_generation_waits_until_an_older_one_has_ended() -> None:
    async with reload_edge(patience=0.5) as edge:
        first, second = edge.backends
        held = []
        for drained, other in ((1, first), (0, second)):
            await edge.publish(drain(edge, drained))
            held.append(asyncio.create_task(edge.get("/stream")))
            await eventually(lambda other=other: other.holding, "the stream to reach the server")
        await edge.publish(drain(edge, 1))
        assert edge.reloads() == 3
        with pytest.raises(PlaneRefused, match=r"2 generations.*worker_shutdown_timeout") as refused:
            await edge.publish(drain(edge, 0))
        assert refused.value.code == "crowded"
        assert edge.reloads() == 3
        first.release.set()
        await held[0]
        await edge.publish(drain(edge, 0))
        assert edge.reloads() == 4
        second.release.set()
        await held[1]


# --- lives ------------------------------------------------------------------------------------------------------------


async def test_a_new_daemon_goes_on_with_ramps_and_knows_what_is_its_own() -> None:
    async with reload_edge() as edge:
        warm, cold = edge.backends
        text = edge.conf.read_bytes()
        await edge.publish([server(warm.port), server(cold.port, warm_up=warm_up(duration_ms=6000))])
        assert b"weight=10" in edge.conf.read_bytes()
        await edge.plane.close()
        second = edge.made()
        status = await second.status()
        assert status.revision == 1
        assert (await second.counters("app")).upstreams["app"][cold.key].warm_started
        await eventually(lambda: edge.conf.read_bytes() == text, "the ramp to end without another table")
        await second.publish(table(2, drain(edge, 0)))
        await second.close()
        third = edge.made()
        await third.publish(table(3, drain(edge)))
        assert edge.conf.read_bytes() == text


class Killed(Exception):
    """What a kill -9 is to the task that it hits."""


async def test_a_daemon_killed_between_writing_and_reloading_is_made_good_by_the_next_one() -> None:
    async with reload_edge() as edge:
        text = edge.conf.read_bytes()
        plane, writer = meddling(edge)

        def kill() -> None:
            raise Killed

        writer.after = kill
        with pytest.raises(Killed):
            await plane.publish(table(1, drain(edge, 0)))
        edge.planes.remove(plane)
        assert edge.conf.read_bytes() != text
        assert edge.reloads() == 0
        assert len(await edge.shares(6)) == 2
        second = edge.made()
        assert (await second.status()).revision == 0
        await second.publish(table(1, drain(edge, 0)))
        assert edge.reloads() == 1
        assert set(await edge.shares(6)) == {edge.backends[1].port}
        await second.publish(table(2, drain(edge)))
        assert edge.conf.read_bytes() == text


async def test_a_damaged_memory_is_refused_with_its_path() -> None:
    async with reload_edge() as edge:
        edge.state.write_text("{")
        with pytest.raises(PlaneRefused, match=r"reload\.json cannot be read") as refused:
            await edge.made().status()
        assert refused.value.code == "state"


async def test_closing_ends_who_waits_for_his_turn() -> None:
    async with reload_edge(pace=Pace(interval=60.0)) as edge:
        await edge.publish(drain(edge, 0))
        waiting = asyncio.create_task(edge.publish(drain(edge, 1)))
        await eventually(lambda: isinstance(edge.plane, ReloadPlane) and edge.plane._asked, "the table to wait")
        await edge.plane.close()
        with pytest.raises(PlaneUnreachable, match="closed"):
            await waiting


# --- in flight --------------------------------------------------------------------------------------------------------


async def test_requests_to_unix_sockets_and_of_older_generations_count(tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    release = asyncio.Event()
    inside = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal inside
        await reader.readuntil(b"\r\n\r\n")
        inside += 1
        await release.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1")
        await writer.drain()
        writer.close()

    def lines(running: list[Backend]) -> str:
        return f"server unix:{path};\n server {running[0].key} backup;"

    entry: dict[str, Any] = {"key": f"unix:{path}", "ip": f"unix:{path}", "port": 0}
    serving = await asyncio.start_unix_server(serve, path)
    async with serving, reload_edge(1, lines) as edge:
        other = server(edge.backends[0].port, backup=True)
        await edge.publish([server(**entry), other])
        asked = [asyncio.create_task(edge.get("/")) for _ in range(3)]
        await eventually(lambda: inside == 3, "the requests to arrive")
        key = entry["key"]

        async def count() -> int:
            return (await edge.plane.counters()).upstreams["app"][str(key)].in_flight

        assert await count() == 3
        await edge.publish([server(**entry, state="drain"), other])
        assert await count() == 3
        assert set(await edge.shares(6)) == {edge.backends[0].port}
        await edge.publish([server(**entry, state="maint"), other])
        assert await count() == 3
        release.set()
        assert [status for status, _ in await asyncio.gather(*asked)] == [200] * 3

        async def empty() -> bool:
            return await count() == 0

        await eventually(empty, "nothing in flight")


async def test_a_new_daemon_still_sees_what_older_workers_hold() -> None:
    async with reload_edge() as edge:
        drained, _ = edge.backends
        await edge.publish(drain(edge, 1))
        asked = asyncio.create_task(edge.get("/hold"))
        await eventually(lambda: drained.holding, "the request to arrive")
        await edge.publish(drain(edge, 0))
        await edge.plane.close()
        edge.plane = edge.made()
        assert await edge.in_flight(drained) == 1
        drained.release.set()
        assert (await asked)[0] == 200
        await edge.empty(drained)
