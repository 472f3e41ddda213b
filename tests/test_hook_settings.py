"""`[*.hooks]` of headgate.toml: what is refused, with the remedy, and the exact calls that each registry gets."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from controller.core.policy import Hook, HookPolicy
from controller.errors import SettingsError
from controller.settings import build
from controller.settings.hooks import HookTable

DOCS = Path(__file__).parents[1] / "docs" / "hooks.md"


def policy(toml: str) -> HookPolicy:
    return build(tomllib.loads(toml), {}, "headgate.toml").policy_for("app").hooks


def registry(toml: str) -> tuple[Hook, Hook]:
    """What is called to leave, and what is called to return."""
    known = policy(f"[upstream.app.hooks.registry]\n{toml}")
    (leave,), (back,) = known.before_drain, known.after_up
    return leave, back


def test_without_hooks_nothing_is_called() -> None:
    assert policy("") == HookPolicy()


def test_registering_is_when_a_server_is_up_or_warm() -> None:
    assert policy('[upstream.app.hooks]\nregister_at = "warm"') == HookPolicy(register_at="warm")
    with pytest.raises(SettingsError, match="register_at: 'late' is not known; write 'up' or 'warm'"):
        policy('[upstream.app.hooks]\nregister_at = "late"')


def test_hooks_are_lists_of_requests_and_commands_in_the_order_in_which_they_stand() -> None:
    known = policy(
        """
        [[upstream.app.hooks.before_drain]]
        url = "https://me:{env:PASSWORD}@example.org/{upstream}?token={file:/run/secrets/token}"
        method = "PUT"
        headers = { X-Token = "{env:TOKEN}" }
        body = '{"server": "{address}", "more": {}}'
        statuses = [200, "404"]
        tries = 5
        timeout = "500ms"
        on_failure = "proceed"

        [[upstream.app.hooks.before_drain]]
        command = ["/usr/local/bin/leave", "{host}"]

        [[upstream.app.hooks.after_drain]]
        command = ["true"]

        [[upstream.app.hooks.after_up]]
        url = "http://127.0.0.1/"
        """
    )
    assert known.before_drain == (
        Hook(
            (("PUT", "https://me:{env:PASSWORD}@example.org/{upstream}?token={file:/run/secrets/token}"),),
            {"X-Token": "{env:TOKEN}"},
            '{"server": "{address}", "more": {}}',
            ((200, 200), (404, 404)),
            (),
            5,
            0.5,
            "proceed",
        ),
        Hook(command=("/usr/local/bin/leave", "{host}")),
    )
    assert known.after_drain == (Hook(command=("true",)),)
    assert known.after_up == (Hook((("POST", "http://127.0.0.1/"),)),)


def test_hooks_of_the_defaults_are_those_of_every_upstream_that_has_none_of_its_own() -> None:
    toml = '[[defaults.hooks.after_up]]\ncommand = ["true"]\n[upstream.app.check]\npath = "/x"\n'
    assert policy(toml).after_up == (Hook(command=("true",)),)
    assert policy(toml + '[[upstream.app.hooks.after_up]]\ncommand = ["false"]').after_up == (Hook(command=("false",)),)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("", "a hook is a request or a command; write either url or command"),
        ('url = "http://x/"\ncommand = ["true"]', "write either url or command"),
        ('command = ["true"]\nbody = "x"', "body means nothing to a command; take it out"),
        ('command = ["login", "{env:PASSWORD}"]', "anybody can see the arguments of a command"),
        ('url = "consul://me:hunter2@x/"', 'begin it with "http://" or "https://"'),
        ('url = "http://x/{hots}?token=hunter2"', "{hots} is no placeholder; there are {upstream}"),
        ('url = "http://x/"\nbody = "{flie:/run/token}"', "{flie:/run/token} is no placeholder"),
        ('url = "http://x/"\nmethod = "FETCH"', "'FETCH' is not known; write 'GET', 'POST'"),
        ('url = "http://x/"\nheaders = { "X Token" = "hunter2" }', "'X Token' is no name of a header"),
        ('url = "http://x/"\ntries = 0', "0 does not fit; it should be greater than or equal to 1"),
        ('uri = "http://x/"', "unknown key; did you mean url?"),
    ],
)
def test_what_is_wrong_is_said_with_place_and_remedy_and_without_secrets(hook: str, message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        policy(f"[[upstream.app.hooks.before_drain]]\n{hook}")
    assert "upstream.app.hooks.before_drain.0" in str(raised.value)
    assert message in str(raised.value)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('preset = "zookeeper"', "'zookeeper' is not known; write"),
        ('service = "app"', 'write preset = one of "spring-actuator", "eureka", "consul", "nacos"'),
        ('preset = "consul"', 'preset = "consul" needs service; write what the registry calls it'),
        ('preset = "eureka"\nservice = "APP"', 'preset = "eureka" needs instance'),
        ('preset = "spring-actuator"\nservice = "app"', 'service means nothing to preset = "spring-actuator"'),
        ('preset = "consul"\nservice = "app"\ngroup = "x"', 'group means nothing to preset = "consul"'),
    ],
)
def test_a_registry_that_cannot_be_called_is_refused(table: str, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        registry(table)


def test_a_spring_application_is_asked_over_both_paths_and_in_the_words_of_every_registry() -> None:
    leave, back = registry('preset = "spring-actuator"')
    base = "http://{host}:{port}/actuator"
    assert leave.requests == (
        ("POST", f"{base}/serviceregistry?status=DOWN"),
        ("POST", f"{base}/service-registry?status=DOWN"),
        ("POST", f"{base}/serviceregistry?status=OUT_OF_SERVICE"),
        ("POST", f"{base}/service-registry?status=OUT_OF_SERVICE"),
    )
    assert back.requests == (
        ("POST", f"{base}/serviceregistry?status=UP"),
        ("POST", f"{base}/service-registry?status=UP"),
    )
    assert leave.headers == back.headers == {"Content-Type": "application/vnd.spring-boot.actuator.v2+json"}
    leave, _ = registry('preset = "spring-actuator"\nurl = "http://{host}:9001/manage/"\nheaders = { X-A = "b" }')
    assert leave.requests[0][1] == "http://{host}:9001/manage/serviceregistry?status=DOWN"
    assert leave.headers["X-A"] == "b"


def test_eureka_gets_an_override_and_loses_it() -> None:
    leave, back = registry('preset = "eureka"\nservice = "APP"\ninstance = "{host}:app:{port}"')
    status = "http://127.0.0.1:8761/eureka/apps/APP/{host}:app:{port}/status?value="
    assert leave.requests == (("PUT", f"{status}OUT_OF_SERVICE"),)
    assert back.requests == (("DELETE", f"{status}UP"),)


def test_consul_puts_the_service_into_maintenance_and_takes_it_out() -> None:
    leave, back = registry(
        'preset = "consul"\nservice = "my/app-{port}"\nurl = "http://10.0.0.9:8500"\n'
        'headers = { X-Consul-Token = "{file:/run/token}" }'
    )
    path = "http://10.0.0.9:8500/v1/agent/service/maintenance/my%2Fapp-{port}?enable="
    assert leave.requests == (("PUT", f"{path}true&reason=headgate"),)
    assert back.requests == (("PUT", f"{path}false"),)
    assert leave.headers == back.headers == {"X-Consul-Token": "{file:/run/token}"}


def test_nacos_is_asked_to_disable_the_instance_by_the_partial_update_of_version_3_and_then_of_older_ones() -> None:
    leave, back = registry('preset = "nacos"\nservice = "app"\ngroup = "shop"\nnamespace = "test"\ncluster = "east"')
    base = "http://127.0.0.1:8848/nacos"
    where = "ip={host}&port={port}&clusterName=east&namespaceId=test&enabled="
    for hook, enabled in ((leave, "false"), (back, "true")):
        assert hook.requests == (
            ("PUT", f"{base}/v3/admin/ns/instance/partial?serviceName=app&groupName=shop&{where}{enabled}"),
            ("PATCH", f"{base}/v1/ns/instance?serviceName=shop%40%40app&{where}{enabled}"),
        )


def test_a_return_is_tried_longer_for_an_application_registers_itself_when_it_is_up() -> None:
    leave, back = registry('preset = "consul"\nservice = "a"\ntries = 2\nreturn_tries = 40\non_failure = "proceed"')
    assert (leave.tries, back.tries) == (2, 40)
    assert leave.on_failure == back.on_failure == "proceed"


def test_the_registry_is_left_first_and_returned_to_last() -> None:
    known = policy(
        '[defaults.hooks]\nregistry = { preset = "consul", service = "a" }\n'
        'before_drain = [{ command = ["one"] }]\nafter_up = [{ command = ["two"] }]'
    )
    assert [bool(hook.command) for hook in known.before_drain] == [False, True]
    assert [bool(hook.command) for hook in known.after_up] == [True, False]


def test_every_key_of_a_hook_stands_in_the_documentation_with_its_default() -> None:
    text = DOCS.read_text().split("\n## Your own calls\n")[1].split("\n## ")[0]
    documented = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", text, re.MULTILINE))
    assert documented.keys() == HookTable.model_fields.keys()
    for key, known in HookTable.model_fields.items():
        if known.default not in (None, ()):
            given = tomllib.loads(f"value = {documented[key].strip('`')}")["value"]
            assert getattr(HookTable.model_validate({"url": "http://x/", key: given}), key) == known.default, key
