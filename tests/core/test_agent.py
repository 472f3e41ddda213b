"""A backend's own words, as HAProxy's agent check has them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.core import agent
from controller.core.events import AgentSaid, ConfigRead
from controller.core.model import Admin, Agent, Warmth
from tests.core.world import POLICY, A, B, C, World, upstream

CLEAR = Agent()


@pytest.mark.parametrize(
    ("words", "report"),
    [
        ("75%", Agent(weight=0.75)),
        ("75%,maxconn:30,maint,down", Agent(0.75, Admin.MAINT, "down", 30)),
        ("maxconn:30", Agent(max_conns=30)),
        ("drain", Agent(admin=Admin.DRAIN)),
        ("stopped", Agent(down="stopped")),
        ("fail", Agent(down="fail")),
        ("down#disk is full", Agent(down="down: disk is full")),
        ("50% down # load, of 99", Agent(0.5, down="down: load, of 99")),
        ("UP READY 100%\r\n", CLEAR),
        ("\t75%\tready ,up\r\ndrain\n", Agent(weight=0.75)),
        ("drain ready drain", Agent(admin=Admin.DRAIN)),
        ("0%", Agent(weight=0.0)),
        ("200%", Agent(weight=2.0)),
        ("999999999%", Agent(weight=256.0)),
        ("", CLEAR),
    ],
)
def test_haproxy_words_and_separators(words: str, report: Agent) -> None:
    assert agent.said(CLEAR, words) == (report, ())


@pytest.mark.parametrize("words", ["75", "-5%", "7.5%", "%", "maxconn:", "maxconn:-1", "9" * 5000 + "%", "²%", "downn"])
def test_other_words_mean_nothing_and_are_told(words: str) -> None:
    assert agent.said(CLEAR, f"{words} drain") == (Agent(admin=Admin.DRAIN), (words,))


def test_what_is_not_mentioned_stays_until_the_agent_takes_it_back() -> None:
    report = Agent(0.75, Admin.MAINT, "down", 30)
    assert agent.said(report, "50%")[0] == Agent(0.5, Admin.MAINT, "down", 30)
    assert agent.said(report, "ready")[0] == Agent(0.75, Admin.READY, "down", 30)
    assert agent.said(report, "up ready 100% maxconn:0")[0] == CLEAR


def test_reported_load_scales_the_weight_in_the_table_without_an_event() -> None:
    world = world_up()
    revision, notes = world.state.revision, len(world.notes)
    say(world, A, "75%")
    assert world.entry(A)["weight"] == 0.75
    assert world.state.revision == revision + 1
    say(world, A, "75% ready")
    assert world.state.revision == revision + 1
    assert len(world.notes) == notes
    say(world, A, "100%")
    assert world.entry(A)["weight"] == 1


def test_no_load_wanted_is_a_drain_and_keeps_a_weight_that_a_table_may_have() -> None:
    world = say(world_up(), A, "0%")
    assert (world.entry(A)["state"], world.entry(A)["weight"]) == ("drain", 1)
    assert world.notes[-1].text == (
        "app: 127.0.0.1:8001 says of itself: ready, up, 0 % of its weight; 2 of 3 servers serving"
    )


def test_maxconn_stands_in_for_the_configured_limit() -> None:
    world = say(world_up(), A, "maxconn:30")
    assert world.entry(A)["max_conns"] == 30
    assert say(world, A, "maxconn:0").entry(A)["max_conns"] == 0


@pytest.mark.parametrize(("word", "state"), [("drain", "drain"), ("maint", "maint"), ("down", "down")])
def test_an_agent_takes_its_server_out_and_only_the_agent_brings_it_back_warming_up(word: str, state: str) -> None:
    world = say(world_up(), A, word)
    assert world.entry(A)["state"] == state
    world.probe(A, times=5).admin(A, Admin.MAINT).admin(A, Admin.READY).probe(A, times=2)
    assert world.entry(A)["state"] == state
    say(world, A, "ready up")
    assert world.entry(A)["state"] == "up"
    assert world.peer(A).warm_up.phase is Warmth.RUNNING


def test_an_operators_wish_and_the_agents_are_apart() -> None:
    world = world_up().admin(A, Admin.MAINT)
    say(world, A, "ready up 100%")
    assert world.peer(A).admin is Admin.MAINT
    assert world.entry(A)["state"] == "maint"


def test_agents_that_call_all_servers_down_do_not_empty_an_upstream() -> None:
    world = world_up()
    for key in (A, B, C):
        say(world, key, "down#too much load")
    assert world.state.groups["app"].fail_open


def test_unknown_words_are_told_and_the_rest_is_followed() -> None:
    world = say(world_up(), A, "50% hello")
    assert world.notes[-1].text == "app: the agent of 127.0.0.1:8001 says what nobody knows: hello"
    assert world.peer(A).agent == Agent(weight=0.5)


def test_a_server_that_left_may_still_talk() -> None:
    world = world_up()
    world.take(ConfigRead((upstream(2),)))
    state = world.state
    world.take(AgentSaid("app", C, "drain"))
    world.take(AgentSaid("other", A, "drain"))
    assert world.state is state


def say(world: World, key: str, words: str) -> World:
    world.take(AgentSaid("app", key, words))
    return world.acknowledge()


def world_up() -> World:
    world = World().configure()
    return world.probe(A, times=2).probe(B, times=2).probe(C, times=2)


def test_when_no_agent_is_asked_any_more_nothing_holds_that_one_said() -> None:
    world = world_up()
    say(world, A, "25% maint maxconn:3")
    asked = replace(POLICY, health=replace(POLICY.health, agent=True))
    world.configure(upstream(policy=asked))
    assert world.peer(A).agent.admin is Admin.MAINT
    world.configure(upstream(policy=POLICY))
    assert world.peer(A).agent == CLEAR
    assert world.entry(A)["state"] == "up"
