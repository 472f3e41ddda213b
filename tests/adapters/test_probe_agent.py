"""Agents: the words of a backend, as a check of its own and beside another one."""

import asyncio
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from controller.core.model import Server
from controller.ports import Check, Target
from tests.adapters.probed import FAST, KEY, PATIENT, Probing, Raw, Web, free_port

AGENT = replace(PATIENT, type="agent")


class Agent:
    """Says its words and closes; `heard` is what it was sent."""

    def __init__(self, raw: Raw) -> None:
        self._raw = raw
        self.words = b"up\n"
        self.hears = False
        self.heard = b""
        self.served = 0

    async def start(self) -> Server:
        return await self._raw.start(self._serve)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.hears:
            self.heard = await reader.readline()
        writer.write(self.words)
        writer.close()
        self.served += 1


@pytest.fixture
def agent(raw: Raw) -> Agent:
    return Agent(raw)


@pytest.mark.parametrize(
    ("line", "words", "ok"),
    [
        (b"up\n", "up", True),
        (b"75%\r\n", "75%", True),
        (b"75%,maxconn:30,ready\tup\nthe rest", "75%,maxconn:30,ready up", True),
        (b"drain", "drain", True),
        (b"maint up\0\n", "maint up.", True),
        (b"Down\n", "Down", False),
        (b"10% fail#disk full, all up\n", "10% fail#disk full, all up", False),
        (b"75%,maxconn:30,maint,stopped\n", "75%,maxconn:30,maint,stopped", False),
        (b"down up\n", "down up", True),
        (b"up what down\n", "up what down", False),
        (b"what up\n", "what up", True),
    ],
)
async def test_the_words_are_told_and_judged(probing: Probing, agent: Agent, line: bytes, words: str, ok: bool) -> None:
    agent.words = line
    result = await probing.once(await agent.start(), AGENT)
    assert probing.said == [words]
    assert (result.ok, result.reason) == (ok, "ok" if ok else "status")
    assert result.detail == words if ok else result.detail.startswith("the agent says ")


@pytest.mark.parametrize("line", [b"hello\n", b"\n", b"# up\n", b"\0\xff\n"])
async def test_a_line_without_a_known_word_is_no_agents(probing: Probing, agent: Agent, line: bytes) -> None:
    agent.words = line
    result = await probing.once(await agent.start(), AGENT)
    assert (result.ok, result.reason) == (False, "error")
    assert result.detail == f"the agent says no word that is known: {''.join(probing.said)}"


async def test_what_it_wants_to_hear_is_sent_first(probing: Probing, agent: Agent) -> None:
    agent.hears = True
    assert (await probing.once(await agent.start(), replace(AGENT, send="app one\n"))).ok
    assert agent.heard == b"app one\n"


async def test_words_are_told_when_they_change_and_after_a_new_start(probing: Probing, agent: Agent) -> None:
    probing.prober.set_targets({KEY: Target(await agent.start(), replace(FAST, type="agent"))})
    for words in ("up", "50% up", "up"):
        agent.words = words.encode()
        before = agent.served
        await probing.when(lambda words=words: probing.said[-1:] == [words])
        seen = len(probing.results)
        await probing.until(seen + 3)
        assert agent.served > before
    assert probing.said == ["up", "50% up", "up"]
    probing.prober.probe_now(*KEY)
    await probing.when(lambda: len(probing.said) == 4)
    assert probing.said[-1] == "up"


async def test_an_agent_beside_a_check_tells_its_words_and_gives_no_verdict(
    probing: Probing, agent: Agent, site: Web
) -> None:
    server = await site.tcp()
    beside = Check(type="agent", port=(await agent.start()).port, interval=0.1, timeout=5)
    agent.words = b"down\n"
    probing.prober.set_targets({KEY: Target(server, replace(FAST, agent=beside))})
    await probing.when(lambda: probing.said == ["down"])
    assert all(result.ok for result in await probing.until(4))

    probing.prober.set_targets({KEY: Target(server, FAST)})  # no agent any more
    served = agent.served
    seen = len(probing.results)
    await probing.until(seen + 4)
    assert agent.served <= served + 1


async def test_an_agent_beside_a_check_that_does_not_answer_changes_nothing_and_is_said_once(
    probing: Probing, agent: Agent, site: Web
) -> None:
    there = await agent.start()
    agent.words = b""
    beside = Check(type="agent", port=there.port, interval=0.1, timeout=5)
    with capture_logs() as lines:
        probing.prober.set_targets({KEY: Target(await site.tcp(), replace(FAST, agent=beside))})
        await probing.until(5)
        await probing.when(lambda: agent.served >= 3)
        agent.words = b"maint\n"
        await probing.when(lambda: probing.said == ["maint"])
    assert [(line["log_level"], line.get("reason")) for line in lines] == [("warning", "reset"), ("info", None)]
    assert all(result.ok for result in probing.results)


async def test_an_agent_that_is_the_check_and_does_not_answer_fails(probing: Probing) -> None:
    port = free_port()
    server = Server(f"127.0.0.1:{port}", f"127.0.0.1:{port}", "127.0.0.1", port)
    assert (await probing.once(server, AGENT)).reason == "refused"
    assert probing.said == []
