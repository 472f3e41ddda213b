"""The same servers behind two upstreams of one nginx, both under load: whatever is done through one loses nothing of
the other."""

from __future__ import annotations

import copy
import re
import signal
from collections.abc import Iterator

import pytest

from controller.demo.stage import UPSTREAM, Stage, free_ports, until
from controller.errors import ApiError

API = "api"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage("gthread", warm_up=1.0) as built:
        yield built


@pytest.fixture(scope="module")
def api(stage: Stage) -> Stage:
    """The same stage, with its url at the other upstream."""
    other = copy.copy(stage)
    (port,) = free_ports(1)
    other.url = f"http://127.0.0.1:{port}"
    conf = stage.prefix / "nginx.conf"
    blocks = re.search(rf"    upstream {UPSTREAM} \{{.*\n    \}}\n(?=\}})", conf.read_text(), re.DOTALL)
    assert blocks is not None
    more = blocks[0].replace(f"upstream {UPSTREAM} ", f"upstream {API} ")
    more = more.replace(f'balance("{UPSTREAM}")', f'balance("{API}")')
    more = more.replace(f"proxy_pass http://{UPSTREAM};", f"proxy_pass http://{API};")
    more = more.replace(stage.url.removeprefix("http://"), f"127.0.0.1:{port}")
    conf.write_text(conf.read_text().replace(blocks[0], blocks[0] + more))
    stage.nginx.send_signal(signal.SIGHUP)

    def serves() -> bool:
        try:
            servers = stage.client.upstream(API)["servers"]
        except ApiError:
            return False
        return all(each["health"] == "up" and each["effective_weight"] == each["weight"] for each in servers)

    until(serves, "the other upstream", 30, stage.prefix / "headgate.log")
    return other


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["rollout", pytest.param("reload", marks=pytest.mark.slow)])
def test_a_change_through_one_upstream_loses_no_request_of_the_other(stage: Stage, api: Stage, kind: str) -> None:
    loads = [stage.load(40), api.load(40)]
    log = stage.prefix / "load.log"
    until(lambda: all(load.read() or load.ticks for load in loads), "traffic", 30, log)
    before = [stage.master(address) for address in stage.addresses]
    change = stage.client.begin_change(kind, UPSTREAM)
    with pytest.raises(ApiError, match=f"change {change} .{kind}. of {UPSTREAM} is still running"):
        stage.client.set_admin(API, stage.addresses[-1], "maint")
    *_, record = stage.client.follow_change(change)
    assert record["status"] == "done", record["error"]
    for load in loads:
        summary = load.finish()
        assert summary["failures"] == {}, summary
        assert summary["requests"] > 100
    if kind == "rollout":
        assert all(stage.master(a) not in (None, old) for a, old in zip(stage.addresses, before, strict=True))
    said = [step["detail"] for step in record["steps"] if step["name"] == "empty"]
    assert said == ["no request in flight, nor by api"] * len(stage.addresses)
    drained = [each for each in stage.client.events(limit=1000) if each["upstream"] == API and each["change"] == change]
    assert [each["server"] for each in drained] == stage.addresses
    for name in (UPSTREAM, API):
        assert [s["effective_weight"] > 0 for s in stage.client.upstream(name)["servers"]] == [True] * 3


@pytest.mark.timeout(300)
def test_a_drain_by_an_operator_leaves_the_other_upstream_alone(stage: Stage, api: Stage) -> None:
    first = stage.addresses[0]
    stage.client.set_admin(API, first, "drain")
    (server,) = stage.client.servers(UPSTREAM, first)
    assert (server["admin"], server["held"], server["effective_weight"] > 0) == ("ready", None, True)
    stage.client.set_admin(API, first, "ready")
