"""http and tcp checks against real servers, and when probes are made. Servers that misbehave: test_probe_faults.py."""

import asyncio
import os
import resource
from dataclasses import replace
from unittest.mock import Mock

import pytest

from controller.adapters.probe import GRID
from controller.ports import Pace, Target
from tests.adapters.probed import FAST, KEY, PATIENT, Probing, Raw, Web, answering, at, free_port


@pytest.mark.parametrize(
    ("path", "reason", "detail"),
    [
        ("/healthz", "ok", "status 200"),
        ("/chunks", "ok", "status 200"),
        ("/long", "ok", "status 200"),
        ("/empty", "ok", "status 204"),
        ("/moved", "ok", "status 302"),
        ("/ill", "status", "status 503"),
    ],
)
async def test_an_http_check_judges_the_status(
    probing: Probing, site: Web, path: str, reason: str, detail: str
) -> None:
    result = await probing.once(await site.tcp(), replace(PATIENT, path=path))
    assert (result.upstream, result.server, result.ok) == (*KEY, reason == "ok")
    assert (result.reason, result.detail) == (reason, detail)
    assert 0 < result.seconds < PATIENT.timeout


@pytest.mark.parametrize("body", [None, "302"])
async def test_a_redirect_is_judged_and_not_followed(probing: Probing, site: Web, body: str | None) -> None:
    check = replace(PATIENT, path="/moved", statuses=((200, 299),), body=body)
    result = await probing.once(await site.tcp(), check)
    assert (result.reason, result.detail) == ("status", "status 302")
    assert [request.path for request in site.site.requests] == ["/moved"]


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/healthz", "is well", "ok"),
        ("/chunks", "is well", "ok"),
        ("/healthz", "is lost", "body"),
        ("/ill", "is lost", "status"),
        ("/long", "end", "body"),
    ],
)
async def test_a_body_check_looks_into_the_first_64_kib(
    probing: Probing, site: Web, path: str, body: str, reason: str
) -> None:
    result = await probing.once(await site.tcp(), replace(PATIENT, path=path, body=body))
    assert result.reason == reason


@pytest.mark.parametrize("body", [None, "well"])
async def test_the_request_names_host_and_agent(probing: Probing, site: Web, body: str | None) -> None:
    server = await site.tcp()
    await probing.once(server, replace(PATIENT, path="/healthz?deep=1", body=body))
    await probing.once(server, replace(PATIENT, host="app.example", body=body))
    first, second = site.site.requests
    assert (first.headers["Host"], first.path_qs) == (server.address, "/healthz?deep=1")
    assert (second.headers["Host"], second.headers["User-Agent"]) == ("app.example", "headgate")


@pytest.mark.parametrize("body", [None, "well"])
async def test_unix_sockets_and_ipv6_are_probed(probing: Probing, site: Web, body: str | None) -> None:
    check = replace(PATIENT, body=body)
    assert (await probing.once(await site.unix(), check)).reason == "ok"
    assert (await probing.once(await site.tcp(host="::1"), check)).reason == "ok"


async def test_a_tcp_check_connects_and_no_more(probing: Probing, site: Web) -> None:
    check = replace(PATIENT, type="tcp")
    for server in (await site.tcp(), await site.unix()):
        result = await probing.once(server, check)
        assert (result.reason, result.detail) == ("ok", "connected")
    assert site.site.requests == []
    assert (await probing.once(at(free_port()), check)).reason == "refused"


async def test_a_check_may_have_a_port_of_its_own(probing: Probing, site: Web) -> None:
    other = await site.tcp()
    assert (await probing.once(at(free_port()), replace(PATIENT, port=other.port))).reason == "ok"


@pytest.mark.parametrize("body", [None, "well"])
@pytest.mark.parametrize(
    ("path", "header", "reason", "detail"),
    [
        ("/healthz", "x-role", "ok", "status 200"),
        ("/healthz", "X-Role: warm", "ok", "status 200"),
        ("/healthz", "X-Role:primary", "ok", "status 200"),
        ("/healthz", "X-Role: cold", "header", '"cold" is not in X-Role: primary, warm'),
        ("/healthz", "Role", "header", "there is no header Role"),
        ("/ill", "X-Role", "status", "status 503"),
    ],
)
async def test_a_header_can_be_demanded_by_name_and_by_a_part_of_its_value(
    probing: Probing, site: Web, path: str, header: str, reason: str, detail: str, body: str | None
) -> None:
    result = await probing.once(await site.tcp(), replace(PATIENT, path=path, header=header, body=body))
    assert (result.reason, result.detail) == (reason, detail)


@pytest.mark.parametrize("body", [None, "x"])
async def test_any_of_several_headers_of_one_name_will_do(probing: Probing, raw: Raw, body: str | None) -> None:
    server = await raw.start(answering("HTTP/1.1 200 OK\r\nVia: a\r\nvia:\tb c\r\n\r\nx"))
    assert (await probing.once(server, replace(PATIENT, header="Via: b c", body=body))).reason == "ok"


async def test_status_header_and_body_are_judged_in_this_order(probing: Probing, site: Web) -> None:
    server = await site.tcp()
    for check, reason in [
        (replace(PATIENT, statuses=((503, 503),), header="No", body="no"), "status"),
        (replace(PATIENT, header="No", body="no"), "header"),
        (replace(PATIENT, header="X-Role", body="no"), "body"),
        (replace(PATIENT, header="X-Role", body="well"), "ok"),
    ]:
        assert (await probing.once(server, check)).reason == reason


async def test_a_body_that_is_compressed_against_our_wish_is_not_unpacked(probing: Probing, site: Web) -> None:
    result = await probing.once(await site.tcp(), replace(PATIENT, path="/gzip", body="is well"))
    assert (result.reason, result.detail) == ("body", '"is well" is not in the body, which is gzip')
    assert site.site.requests[0].headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("body", [None, "x"])
async def test_an_interim_answer_is_passed_over(probing: Probing, raw: Raw, body: str | None) -> None:
    answer = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\n\r\nx"
    assert (await probing.once(await raw.start(answering(answer)), replace(PATIENT, body=body))).detail == "status 200"


async def test_probes_follow_each_other_at_the_interval(probing: Probing, site: Web) -> None:
    probing.prober.set_targets({KEY: Target(await site.tcp(), replace(FAST, interval=0.4, jitter=0.0))})
    assert all(result.ok for result in await probing.until(4))
    second, third, fourth = probing.began[1:4]  # the second one comes early
    assert min(third - second, fourth - third) >= 0.4 - GRID[0]


async def test_a_server_that_changes_in_weight_only_keeps_its_rhythm(probing: Probing, site: Web) -> None:
    server = await site.tcp()
    await probing.once(server, PATIENT)
    probing.prober.set_targets({KEY: Target(replace(server, weight=9, down=True), PATIENT)})
    probing.prober.set_targets(
        {KEY: Target(server, PATIENT), ("app", "two"): Target(server, PATIENT)},
    )
    await probing.until(2)
    assert [result.server for result in probing.results] == ["one", "two"]
    probing.prober.set_targets({KEY: Target(server, replace(PATIENT, path="/ill"))})
    assert (await probing.until(3))[2].reason == "status"


async def test_a_probe_under_way_that_is_dropped_says_nothing(probing: Probing, raw: Raw) -> None:
    asked: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.put_nowait(writer)

    probing.prober.set_targets({KEY: Target(await raw.start(hold), PATIENT)})
    first = await asked.get()
    probing.prober.probe_now(*KEY)
    second = await asked.get()
    first.close()
    second.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert [result.reason for result in await probing.until(1)] == ["ok"]
    second.close()
    probing.prober.probe_now(*KEY)
    third = await asked.get()
    await probing.prober.close()
    third.close()
    assert len(probing.results) == 1


async def test_another_pace_leaves_a_probe_under_way_alone(probing: Probing, raw: Raw) -> None:
    asked: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.put_nowait(writer)

    server = await raw.start(hold)
    check = replace(PATIENT, fast_interval=0.1)
    probing.prober.set_targets({KEY: Target(server, check)})
    first = await asked.get()
    probing.prober.set_targets({KEY: Target(server, check, Pace.FAST)})
    first.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert (await probing.until(1))[0].ok
    (await asked.get()).close()  # and the next one comes at the new pace


@pytest.mark.parametrize("pace", [Pace.FAST, Pace.DOWN])
async def test_another_pace_shortens_the_wait_at_once_and_ends_with_it(probing: Probing, site: Web, pace: Pace) -> None:
    server, other = await site.tcp(), ("app", "other")
    check = replace(PATIENT, interval=600, fast_interval=0.1, down_interval=0.1)

    def at_pace(pace: Pace) -> None:
        probing.prober.set_targets({KEY: Target(server, check, pace), other: Target(server, FAST)})

    def count(name: str) -> int:
        return sum(result.server == name for result in probing.results)

    at_pace(Pace.STEADY)
    await probing.until(1)
    at_pace(pace)
    await probing.when(lambda: count("one") >= 4)
    at_pace(Pace.STEADY)
    ended = count("one")
    seen = count("other")
    await probing.when(lambda: count("other") >= seen + 5)
    assert count("one") <= ended + 1  # that for which it waited already


async def test_a_pace_without_an_interval_of_its_own_changes_nothing(probing: Probing, site: Web) -> None:
    server, other = await site.tcp(), ("app", "other")
    for pace in (Pace.STEADY, Pace.FAST, Pace.DOWN):
        probing.prober.set_targets(
            {KEY: Target(server, replace(PATIENT, interval=6e5), pace), other: Target(server, FAST)}
        )
        seen = len(probing.results)
        await probing.until(seen + 3)
    assert [result.server for result in probing.results].count("one") == 1


async def test_the_second_probes_of_many_servers_do_not_fall_together(probing: Probing, site: Web) -> None:
    server = await site.tcp()
    check = replace(FAST, interval=1.0, jitter=0.0)
    probing.prober.set_targets({("app", str(number)): Target(server, check) for number in range(40)})
    await probing.until(80)
    seconds = [round(began / GRID[0]) for began in probing.began[40:80]]
    assert len(set(seconds)) >= 5


async def test_probing_what_is_no_target_does_nothing(probing: Probing) -> None:
    probing.prober.probe_now("app", "nobody")
    await probing.prober.close()
    assert probing.results == []


async def test_want_of_file_descriptors_is_not_the_servers_fault(
    probing: Probing, site: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await site.tcp()
    logged: asyncio.Queue[str] = asyncio.Queue()
    log = Mock(warning=lambda event, **values: logged.put_nowait(values["error"]))
    monkeypatch.setattr("controller.adapters.probe.prober._log", log)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_free = os.dup(0)
    os.close(next_free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_free, limits[1]))
        probing.prober.set_targets({KEY: Target(server, FAST)})
        async with asyncio.timeout(5):
            assert await logged.get() == "too many open files"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (await probing.until(1))[0].ok
