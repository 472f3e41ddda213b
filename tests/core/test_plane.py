"""What nginx says of the table that it serves, and what follows for ours."""

import pytest

from controller.core.events import ConfigFailed, Note, PlaneLost, PlaneSeen, TableRefused
from controller.core.model import Admin, ChangeKind, Refused, StepName, StepState
from tests.core.world import A, World


def said(world: World) -> list[str]:
    return [note.text for note in world.notes if isinstance(note, Note) and note.kind == "plane"]


def test_a_table_of_the_same_number_from_another_life_is_not_taken_for_ours() -> None:
    """A daemon that lost the end of its store comes to numbers that nginx knows from before, with another content."""
    world = World().configure()
    world.nginx = False
    world.admin(A, Admin.DRAIN)
    revision = world.state.revision
    world.take(PlaneSeen("boot", revision, ours=False))
    assert world.state.revision == revision + 1
    world.take(PlaneSeen("boot", revision + 1))
    assert world.state.revision == revision + 1


def test_before_nginx_conf_was_read_no_upstream_is_called_unknown() -> None:
    world = World()
    world.take(ConfigFailed("nginx.conf:7: unexpected }"))
    with pytest.raises(Refused, match=r"nginx\.conf has not been read yet: nginx\.conf:7") as refused:
        world.wish(ChangeKind.RESTART, A)
    assert refused.value.code == "unread"


def test_a_drain_waits_for_a_table_of_this_life() -> None:
    world = World().configure()
    world.nginx = False
    number = world.wish(ChangeKind.DRAIN, A)
    world.take(PlaneSeen("boot", world.state.revision, ours=False))
    assert [s.name for s in world.change(number).steps if s.state is StepState.RUNNING] == [StepName.DRAIN]
    world.take(PlaneSeen("boot", world.state.revision))
    assert [s.name for s in world.change(number).steps if s.state is StepState.RUNNING] == [StepName.EMPTY]


def test_a_refused_table_is_told_once_and_stays_known_until_nginx_takes_one() -> None:
    world = World().configure()
    world.nginx = False
    served = world.state.revision
    world.admin(A, Admin.DRAIN)
    for _ in range(3):
        world.take(TableRefused("no room for 5000 servers"))
        world.take(PlaneSeen("boot", served, ours=False))
    assert world.state.plane.trouble == "no room for 5000 servers"
    assert said(world)[-1] == "nginx does not take the table, and goes on with the one before: no room for 5000 servers"
    assert len([text for text in said(world) if "does not take" in text]) == 1
    world.take(PlaneLost("connection refused"))
    assert world.state.plane.trouble == "connection refused"
    world.take(PlaneSeen("boot", served, ours=False))
    assert world.state.plane.trouble == "no room for 5000 servers"
    world.take(PlaneSeen("boot", world.state.revision))
    assert world.state.plane.trouble == ""
    assert said(world)[-1] == f"nginx takes tables again; it serves revision {world.state.revision}"
