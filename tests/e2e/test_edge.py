"""`headgate check` and `headgate edge` over a real nginx, on both data planes."""

from __future__ import annotations

import json
import socket

import pytest

from tests.support.nginx import missing_parts, wait_until
from tests.support.site import LUA, Site

pytestmark = pytest.mark.skipif(missing_parts() is not None, reason=str(missing_parts()))


@pytest.mark.parametrize("plane", ["lua", "reload"])
def test_without_a_daemon_check_asks_nginx_itself_and_an_edge_that_was_offline_stays_so(plane: str) -> None:
    with Site(module=LUA if plane == "lua" else "", plane=plane) as site:
        site.start()
        assert site.headgate("adopt", "--yes").returncode == 0
        done = site.headgate("check")
        assert done.returncode == 0, done.stderr
        assert "by itself, but no daemon answers" in done.stdout
        mark = site.prefix / "store" / "edge-offline"
        mark.touch()
        done = site.headgate("check")
        assert done.returncode == 1
        assert "this edge is offline" in done.stderr
        mark.unlink()
        assert site.headgate("check").returncode == 0
        site.kill_nginx()
        done = site.headgate("check")
        assert done.returncode == 1
        assert "no daemon answers" in done.stderr


def test_drain_waits_for_the_connections_of_clients_that_nginx_has() -> None:
    with Site() as site:
        site.start()
        assert site.headgate("adopt", "--yes").returncode == 0
        site.start_daemon()
        wait_until(lambda: site.headgate("check", "--upstream", "app").returncode == 0, "the edge takes traffic", 30)
        with socket.create_connection(("127.0.0.1", site.port)):
            done = site.headgate("edge", "drain", "--wait", "--settle", "0", "--timeout", "0")
            assert done.returncode == 1
            assert "1 client connections are left" in done.stderr
            assert site.get()[0] == 200, "nginx serves what comes"
        done = site.headgate("edge", "drain", "--wait", "--settle", "0", "--timeout", "20")
        assert done.returncode == 0, done.stderr
        assert json.loads(site.headgate("status", "--json").stdout)["offline"] is True
