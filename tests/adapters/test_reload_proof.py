"""One verified reload of a real nginx, and everything that can keep its proof away."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from controller.adapters.nginx.verify import ReloadFailed, version_include, workers
from controller.ports import PlaneUnreachable
from tests.support.edge import reload_edge
from tests.support.nginx import missing_parts, wait_until

pytestmark = pytest.mark.skipif(missing_parts() is not None, reason=str(missing_parts()))


async def test_a_reload_is_proved_by_newer_workers_and_the_version_that_they_serve() -> None:
    async with reload_edge() as edge:
        reloader = edge.reloader()
        before, boot = set(edge.nginx.workers()), await reloader.master()
        assert await reloader.served() == "0"
        older = await reloader.reload("1-a")
        assert {pid for pid, _ in older} == before
        assert await reloader.served() == "1-a"
        assert reloader.on_disk("1-a")
        assert not reloader.on_disk("0")
        assert await reloader.master() == boot
        accepting = {worker.identity[0] for worker in workers(boot[0]) if not worker.exiting}
        assert accepting
        assert not accepting & before


async def test_two_reloads_at_once_come_one_after_the_other() -> None:
    async with reload_edge() as edge:
        reloader = edge.reloader()
        await asyncio.gather(reloader.reload("1-a"), reloader.reload("2-b"))
        assert edge.reloads() == 2
        assert await reloader.served() == "2-b"


async def test_rules_of_the_http_block_do_not_hide_the_version() -> None:
    async with reload_edge() as edge:
        edge.nginx.http += " deny all; error_page 403 =418 /no; add_header X 1 always; gzip on; gzip_types *;"
        edge.nginx.write()
        await edge.reloader().reload("1-a")


async def test_what_nginx_refuses_is_not_told_to_it_and_its_own_line_is_shown() -> None:
    async with reload_edge() as edge:
        edge.nginx.http += "\n bogus on;"
        edge.nginx.write()
        include = edge.version_file.read_bytes()
        with pytest.raises(ReloadFailed, match=r'unknown directive "bogus".*nginx\.conf:\d+') as failed:
            await edge.reloader().reload("1-a")
        assert not failed.value.taken
        assert edge.version_file.read_bytes() == include
        assert edge.reloads() == 0


async def test_a_master_that_does_not_react_is_no_proof() -> None:
    async with reload_edge() as edge:
        reloader = edge.reloader(timeout=0.5)
        master, _ = await reloader.master()
        os.kill(master, signal.SIGSTOP)
        try:
            with pytest.raises(ReloadFailed, match="no new worker has come") as failed:
                await reloader.reload("1-a")
        finally:
            os.kill(master, signal.SIGCONT)
        assert not failed.value.taken
        assert reloader.on_disk("0")


async def test_an_old_worker_that_goes_on_accepting_is_no_proof() -> None:
    async with reload_edge() as edge:
        stuck = edge.nginx.serving()[0]
        os.kill(stuck, signal.SIGSTOP)
        try:
            with pytest.raises(ReloadFailed, match=f"old workers still accept: {stuck} ") as failed:
                await edge.reloader(timeout=0.5).reload("1-a")
        finally:
            os.kill(stuck, signal.SIGCONT)
        assert failed.value.taken


async def test_a_configuration_that_does_not_include_the_version_is_no_proof() -> None:
    async with reload_edge() as edge:
        edge.nginx.http = edge.nginx.http.replace(f'include "{edge.version_file}";', "")
        edge.nginx.write()
        with pytest.raises(ReloadFailed, match="does not answer on") as failed:
            await edge.reloader(timeout=0.5).reload("1-a")
        assert failed.value.taken


async def test_without_nginx_there_is_nothing_to_reload() -> None:
    async with reload_edge() as edge:
        edge.nginx.stop()
        with pytest.raises(PlaneUnreachable, match="no nginx runs with"):
            await edge.reloader().reload("1-a")
        with pytest.raises(PlaneUnreachable, match="headgate adopt"):
            await edge.reloader().served()


async def test_the_socket_that_a_killed_nginx_left_is_removed_so_that_nginx_can_start() -> None:
    async with reload_edge() as edge:
        reloader = edge.reloader()
        assert await reloader.served() == "0"
        edge.nginx.stop(signal.SIGKILL)
        wait_until(lambda: refuses(edge.version_socket), "the workers to be gone")

        async def removed() -> bool:
            with pytest.raises(PlaneUnreachable):
                await reloader.served()
            return not edge.version_socket.exists()

        begin = time.monotonic()
        while not await removed():
            assert time.monotonic() - begin < 10
            await asyncio.sleep(0.05)
        edge.nginx.start()
        assert await reloader.served() == "0"


async def test_the_socket_of_a_running_nginx_is_never_removed() -> None:
    async with reload_edge() as edge:
        reloader = edge.reloader()
        await reloader.served()
        edge.version_socket.unlink()
        with socket.socket(socket.AF_UNIX) as bound:  # a socket that refuses, while a master runs
            bound.bind(str(edge.version_socket))
            begin = time.monotonic()
            while time.monotonic() - begin < 1.5:
                with pytest.raises(PlaneUnreachable):
                    await reloader.served()
                await asyncio.sleep(0.1)
            assert edge.version_socket.exists()


def refuses(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            return False
        return False


@pytest.mark.parametrize("path", ["relative.sock", "/a\nb", "/" + "x" * 107])
def test_a_path_that_nginx_could_not_take_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        version_include(Path(path), "1")


def test_a_path_is_quoted_as_nginx_reads_it() -> None:
    assert rb'listen "unix:/a b\"c\\d";' in version_include(Path('/a b"c\\d'), "1")
