"""The control protocol, and the client that speaks it, against a real nginx."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from controller.adapters.nginx.lua import LuaPlane, PlaneRefused, PlaneUnreachable, render_include
from tests.lua.house import edge, server, table
from tests.support.nginx import ROOT, Nginx, free_port

CASES = sorted((ROOT / "tests" / "fixtures" / "tables").glob("*.json"))
DEFAULTS = {
    "lua": "/usr/share/headgate/lua",
    "socket": "/run/headgate/nginx.sock",
    "snapshot": "/var/lib/headgate/table.json",
}


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


async def request(nginx: Nginx, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
    connector = aiohttp.UnixConnector(path=str(nginx.socket))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.request(method, "http://nginx" + path, data=body) as response,
    ):
        assert response.content_type == "application/json"
        return response.status, await response.json()


@pytest.mark.usefixtures("lua_nginx")
async def test_every_fixture_is_answered_as_it_expects_and_a_refused_table_changes_nothing() -> None:
    with Nginx("") as nginx:
        revision = 0
        for path in CASES:
            case = json.loads(path.read_text())
            if case["expect"]["status"] == 200:
                revision += 1
                case["table"]["revision"] = revision
            status, answer = await request(nginx, "PUT", "/v1/table", json.dumps(case["table"]).encode())
            assert status == case["expect"]["status"], (path.name, answer)
            if status == 400:
                assert answer["error"]["code"] == case["expect"]["code"], path.name
                assert all(word in answer["error"]["message"] for word in case["expect"]["mentions"]), (
                    path.name,
                    answer,
                )
                assert answer["error"]["remedy"]
            assert answer["revision"] == revision, path.name


@pytest.mark.usefixtures("lua_nginx")
async def test_status_names_format_boot_revision_and_workers() -> None:
    with Nginx("", workers=3) as nginx:
        status, answer = await request(nginx, "GET", "/v1/status")
        assert status == 200
        assert re.fullmatch("[0-9a-f]{32}", answer.pop("boot"))
        assert sorted(answer.pop("workers")) == sorted(nginx.workers())
        assert answer == {"format": 1, "revision": 0}


@pytest.mark.usefixtures("lua_nginx")
@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("PUT", "/v1/table", 400, "invalid_json"),
        ("GET", "/v1/nothing", 404, "unknown_route"),
        ("DELETE", "/v1/table", 405, "method_not_allowed"),
    ],
)
async def test_what_is_not_understood_gets_the_one_error_shape(method: str, path: str, status: int, code: str) -> None:
    with Nginx("") as nginx:
        got, answer = await request(nginx, method, path, b'{"half":')
        assert (got, answer["error"]["code"]) == (status, code)
        assert answer["error"]["message"]
        assert answer["error"]["remedy"]


@pytest.mark.usefixtures("lua_nginx")
async def test_the_same_table_may_be_put_twice_but_no_other_at_or_below_its_revision() -> None:
    async with edge(1) as app:
        first = table(5, [server(app.backends[0].port)])
        assert (await app.plane.publish(first)).revision == 5
        assert (await app.plane.publish(first)).revision == 5
        kept = app.nginx.snapshot.read_bytes()
        for revision in (4, 5):
            with pytest.raises(PlaneRefused) as refusal:
                await app.plane.publish(table(revision, [server(free_port())]))
            assert (refusal.value.code, refusal.value.revision) == ("stale_revision", 5)
        assert app.nginx.snapshot.read_bytes() == kept
        assert set(await app.shares(4)) == {app.backends[0].port}


@pytest.mark.usefixtures("lua_nginx")
async def test_unknown_fields_do_not_reach_the_workers() -> None:
    async with edge(1) as app:
        junk = {"cell": 10**6, "ramp": {"held": False}, "requests_before": 7, "at": -1, "address": "nowhere"}
        await app.plane.publish(table(1, [server(app.backends[0].port, **junk)]) | {"free": [-1], "left": [{}]})
        assert set(await app.shares(3)) == {app.backends[0].port}
        counted = await app.settled(app.backends[0])
        assert (counted.requests, counted.warm_epoch) == (3, None)


@pytest.mark.usefixtures("lua_nginx")
async def test_of_tables_put_at_the_same_time_the_newest_wins_on_every_worker() -> None:
    async with edge(2, workers=3) as app:
        tables = [table(revision, [server(app.backends[revision % 2].port)]) for revision in range(1, 41)]
        bodies = [json.dumps(each).encode() for each in tables]
        answers = await asyncio.gather(*(request(app.nginx, "PUT", "/v1/table", body) for body in bodies))
        assert {status for status, _ in answers} <= {200, 409}
        assert (await app.plane.status()).revision == 40
        assert set(await app.shares(12, one_shot=True)) == {app.backends[0].port}


@pytest.mark.usefixtures("lua_nginx")
async def test_a_table_that_does_not_fit_is_refused_and_the_former_one_stays() -> None:
    def small(text: str) -> str:
        return text.replace("headgate_table 8m", "headgate_table 64k")

    async with edge(1, edit=small) as app:
        await app.publish([server(app.backends[0].port)])
        for count in (1000, 5000):
            with pytest.raises(PlaneRefused) as refusal:
                await app.publish([server(1 + i, key=str(i)) for i in range(count)])
            assert refusal.value.code == "no_room"
        assert (await app.plane.status()).revision == 1
        assert json.loads(app.nginx.snapshot.read_text())["revision"] == 1
        assert set(await app.shares(4, one_shot=True)) == {app.backends[0].port}
        await app.publish([server(app.backends[0].port)])


@pytest.mark.usefixtures("lua_nginx")
async def test_a_thousand_servers_fit_and_more_than_there_are_counters_do_not() -> None:
    async with edge(1) as app:
        await app.publish(
            [server(app.backends[0].port), *(server(1 + i, key=str(i), state="drain") for i in range(1000))]
        )
        assert set(await app.shares(4)) == {app.backends[0].port}
        with pytest.raises(PlaneRefused) as refusal:
            await app.publish([server(1 + i, key=f"k{i}") for i in range(4097)])
        assert refusal.value.code == "no_room"
        assert len((await app.counters()).upstreams["app"]) == 1001


@pytest.mark.usefixtures("lua_nginx")
async def test_counters_of_one_upstream_can_be_asked_for() -> None:
    async with edge(1) as app:
        document = table(1, [server(app.backends[0].port)])
        document["upstreams"]["b c&d"] = document["upstreams"]["app"]
        await app.plane.publish(document)
        await app.shares(3)
        assert set((await app.plane.counters()).upstreams) == {"app", "b c&d"}
        only = await app.plane.counters("b c&d")
        assert {key: peer.requests for key, peer in only.upstreams["b c&d"].items()} == {app.backends[0].key: 0}
        assert (await app.plane.counters("unknown")).upstreams == {}


@pytest.mark.usefixtures("lua_nginx")
async def test_the_client_takes_the_socket_away_from_other_users() -> None:
    with Nginx("") as nginx:
        assert nginx.socket.stat().st_mode & 0o777 == 0o666
        async with LuaPlane(nginx.socket, nginx.snapshot) as plane:
            await plane.status()
        assert nginx.socket.stat().st_mode & 0o777 == 0o660


async def test_without_nginx_the_client_says_where_it_looked_and_the_snapshot_waits_for_nginx(tmp_path: Path) -> None:
    async with LuaPlane(tmp_path / "nginx.sock", tmp_path / "table.json") as plane:
        with pytest.raises(PlaneUnreachable, match=r"nginx\.sock"):
            await plane.status()
        with pytest.raises(PlaneUnreachable) as unreachable:
            await plane.publish(table(3, [server(1)]))
        assert unreachable.value.remedy
    assert {name: json.loads(text)["revision"] for name, text in contents(tmp_path).items()} == {"table.json": 3}


@pytest.mark.parametrize("body", [b"lost", b"[]", b"{}"])
async def test_an_answer_of_something_else_counts_as_unreachable(tmp_path: Path, body: bytes) -> None:
    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    listener = await asyncio.start_unix_server(garbage, tmp_path / "nginx.sock")
    async with listener, LuaPlane(tmp_path / "nginx.sock", tmp_path / "table.json") as plane:
        with pytest.raises(PlaneUnreachable):
            await plane.status()


def test_the_include_mentions_its_default_places_literally() -> None:
    template = (ROOT / "nginx" / "headgate.conf").read_text()
    assert render_include(template, **DEFAULTS) == template


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"lua": "relative"}, "absolute"),
        ({"lua": "/with;semicolon"}, "search path"),
        ({"socket": "/" + "x" * 107}, "107"),
        ({"snapshot": "/a\nb"}, "control characters"),
    ],
)
def test_places_that_nginx_could_not_take_are_refused(changes: dict[str, str], word: str) -> None:
    template = (ROOT / "nginx" / "headgate.conf").read_text()
    with pytest.raises(ValueError, match=word):
        render_include(template, **(DEFAULTS | changes))
