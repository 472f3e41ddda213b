"""headgate.toml: what is accepted, what is refused and in which words, and that the documentation is complete."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from controller import settings
from controller.core.policy import BalancePolicy, Policy, ProcessPolicy, WarmUpPolicy
from controller.errors import SettingsError
from controller.ports import Check
from controller.settings import Settings, build, load

DOCS = Path(__file__).parents[1] / "docs" / "settings.md"


def read(toml: str, **environ: str) -> Settings:
    return build(tomllib.loads(toml), environ, "headgate.toml")


def refusal(toml: str, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read(toml, **environ)
    return caught.value.message.splitlines()


def test_the_defaults_are_those_of_the_core_and_the_ports() -> None:
    empty = read("")
    assert empty.policy_for("app") == Policy()
    assert empty.check_for("app") == Check()
    assert read("[defaults.process]").policy_for("app").process == ProcessPolicy()


@pytest.mark.parametrize(
    ("text", "seconds"), [('"500ms"', 0.5), ('"2s"', 2), ('"2m"', 120), ('"1h"', 3600), ("7", 7), ("0.25", 0.25)]
)
def test_durations_have_units_or_are_seconds(text: str, seconds: float) -> None:
    assert read(f"[defaults.drain]\ntimeout = {text}").policy_for("app").drain.timeout == seconds


@pytest.mark.parametrize(
    ("text", "floor"), [('"10%"', 0.1), ('"0.5%"', 0.005), ("0.35", 0.35), ('"100%"', 1), ("1", 1)]
)
def test_percentages_have_a_sign_or_are_fractions(text: str, floor: float) -> None:
    assert read(f"[defaults.warm_up]\nfloor = {text}").policy_for("app").warm_up.floor == pytest.approx(floor)


def test_zero_switches_a_warm_up_and_its_holds_off() -> None:
    off = read("[defaults.warm_up]\nduration = 0\nhold_errors = 0\nhold_latency = 0\nsteps = 0").policy_for("app")
    assert off.warm_up == WarmUpPolicy(duration=0.0, hold_errors=0.0, hold_latency=0.0)


def test_statuses_are_numbers_and_ranges() -> None:
    assert read('[defaults.check]\nstatuses = [204, "300-399"]').check_for("a").statuses == ((204, 204), (300, 399))


def test_an_upstream_overrides_the_defaults_key_by_key() -> None:
    both = read(
        """
        [defaults.check]
        path = "/live"
        rise = 5
        [defaults.process]
        margin = "1s"
        [upstream.app.check]
        path = "/ready"
        [upstream.app.process]
        start = ["gunicorn", "--bind", "{address}"]
        environment = {A = "b"}
        [upstream.app.warm_up]
        curve = 2
        """
    )
    app, other = both.policy_for("app"), both.policy_for("other")
    assert (both.check_for("app").path, both.check_for("other").path) == ("/ready", "/live")
    assert (app.health.rise, other.health.rise) == (5, 5)
    assert app.process == ProcessPolicy(start=("gunicorn", "--bind", "{address}"), margin=1, environment={"A": "b"})
    assert other.process == ProcessPolicy(margin=1)
    assert (app.warm_up, other.warm_up) == (WarmUpPolicy(curve=2), WarmUpPolicy())


def test_an_upstream_with_another_type_of_check_leaves_what_belongs_to_the_defaults_type() -> None:
    both = read('[defaults.check]\nbody = "ok"\nfast_interval = "1s"\n[upstream.db]\ncheck.type = "tcp"')
    assert both.check_for("app") == Check(body="ok", fast_interval=1)
    assert both.check_for("db") == Check(type="tcp", fast_interval=1)


def test_an_upstream_with_another_method_leaves_what_belongs_to_the_defaults_method() -> None:
    both = read(
        """
        [defaults.balance]
        method = "hash"
        key = "$uri"
        bound = 1.25
        [upstream.random.balance]
        method = "random"
        [upstream.written.balance]
        method = ""
        [upstream.plain.balance]
        bound = 0
        consistent = false
        """
    )
    assert both.policy_for("app").balance == BalancePolicy("hash", "$uri", bound=1.25)
    assert both.policy_for("random").balance == BalancePolicy("random")
    assert both.policy_for("written").balance == BalancePolicy(bound=1.25)
    assert both.policy_for("plain").balance == BalancePolicy("hash", "$uri", consistent=False)


def test_the_environment_goes_before_the_file() -> None:
    both = read(
        '[api]\nsocket = "/file"\nlisten = "127.0.0.1:1"',
        HEADGATE_API__SOCKET="/variable",
        HEADGATE_DEFAULTS__CHECK__PORT="81",
        HEADGATE_DEFAULTS__CHECK__STATUSES='["200-204"]',
        HEADGATE_DEFAULTS__CHECK__INTERVAL="5s",
        HEADGATE_CONFIG="/elsewhere",
    )
    assert (both.api.socket, both.api.address) == ("/variable", ("127.0.0.1", 1))
    check = both.check_for("app")
    assert (check.port, check.statuses, check.interval) == (81, ((200, 204),), 5)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    assert refusal(
        """
        [nginx]
        data_plane = "envoy"
        [log]
        level = "loud"
        [defaults.check]
        intervall = "2s"
        timeout = "2 parsecs"
        [upstream.app.chekc]
        [upstream.app.check]
        path = "ready"
        """,
        HEADGATE_LOG__FORMAT="xml",
    ) == [
        "headgate.toml: nginx.data_plane: 'envoy' is not known; write 'lua' or 'reload'",
        "headgate.toml: log.level: 'loud' is not known; write 'debug', 'info', 'warning' or 'error'",
        "HEADGATE_LOG__FORMAT: log.format: 'xml' is not known; write 'console' or 'json'",
        "headgate.toml: defaults.check.timeout: '2 parsecs' is no duration; "
        'write "2s", "500ms", "2m", "1h" or a number of seconds',
        "headgate.toml: defaults.check.intervall: unknown key; did you mean interval?",
        "headgate.toml: upstream.app.check.path: 'ready' is no path of a URL; begin it with \"/\" and encode blanks",
        "headgate.toml: upstream.app.chekc: unknown key; did you mean check?",
    ]


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[defaults.check]\nrise = 0", "defaults.check.rise: 0 does not fit; it should be greater than or equal to 1"),
        ("[defaults.check]\nfall = 1.5", "defaults.check.fall: must be a whole number"),
        ('[defaults.check]\nverify = "yes"', "defaults.check.verify: must be true or false"),
        ('[defaults.check]\ninterval = "500ms"', "defaults.check: timeout (1 s) is longer than interval (0.5 s)"),
        ('[defaults.check]\ninterval = "10ms"', "defaults.check.interval: '10ms' does not fit"),
        (
            '[defaults.check]\ntype = "ftp"',
            "'ftp' is not known; write 'http', 'https', 'tcp', 'grpc', 'grpcs' or 'agent'",
        ),
        ("[defaults.check]\nstatuses = []", "defaults.check.statuses: must not be empty; fill it, or leave it out"),
        ('[defaults.check]\nbody = ""', "defaults.check.body: must not be empty; fill it, or leave it out"),
        ('[defaults.check]\nstatuses = ["400-200"]', "'400-200' is no HTTP status or range"),
        ('[defaults.check]\npath = "/a\\r\\nX: y"', "is no path of a URL"),
        ('[defaults.check]\nhost = "a\\r\\nX: y"', "is no host name"),
        ('[defaults.check]\nca_file = "/no/such.pem"', "'/no/such.pem' does not exist or cannot be read; create it"),
        ("[defaults.rollout]\nmax_latency = 0.5", "max_latency = 0.5 is no longer than before; write 2.0, or 0"),
        ('[defaults.check]\nfast_interval = "3s"', "fast_interval (3 s) is longer than interval (2 s); shorten it"),
        ('[defaults.check]\nfast_interval = "0.5s"', "timeout (1 s) is longer than fast_interval (0.5 s); shorten it"),
        ('[defaults.check]\ndown_interval = "0.5s"', "timeout (1 s) is longer than down_interval (0.5 s); shorten it"),
        ('[defaults.agent]\ninterval = "0.5s"', "defaults.agent: timeout (1 s) is longer than interval (0.5 s)"),
        (
            '[defaults.check]\ntype = "tcp"\nbody = "ok"',
            'defaults.check: body means nothing to type = "tcp"; take it out, or write type = "http" or "https"',
        ),
        ('[defaults.check]\ntype = "agent"\nheader = "X"', 'header means nothing to type = "agent"; take it out'),
        (
            '[defaults.check]\nservice = "a"',
            'service means nothing to type = "http"; take it out, or write type = "grpc"',
        ),
        ('[defaults.check]\nsend = "a"', 'send means nothing to type = "http"; take it out, or write type = "agent"'),
        ("[defaults.check]\nverify = false", 'or write type = "https" or "grpcs"'),
        (f'[defaults.check]\ntype = "https"\nclient_key = "{__file__}"', "client_key without client_cert; name the"),
        (f'[defaults.check]\ntype = "https"\nclient_cert = "{__file__}"', "are not a certificate and its key ("),
        (f'[defaults.check]\ntype = "grpcs"\nca_file = "{__file__}"', "holds no certificates in PEM ("),
        ('[defaults.check]\nheader = "two words"', "'two words' is no header; write"),
        (
            '[upstream.app]\nagent.port = 1\ncheck.type = "agent"',
            'upstream.app: check.type = "agent" and agent.port are two agents of one server',
        ),
        ('[defaults.warm_up]\nfloor = "0%"', "defaults.warm_up.floor: '0%' does not fit; it should be greater than 0"),
        ('[defaults.warm_up]\nfloor = "101%"', "is more than the whole"),
        ("[defaults.warm_up]\nfloor = 10", '10 is more than the whole; write "10%" or at most 1.0'),
        ("[defaults.warm_up]\ncurve = 0", "it should be greater than 0"),
        ("[defaults.warm_up]\ncurve = nan", "it should be"),
        ("[defaults.warm_up]\nduration = -1", "-1 is no duration"),
        ("[defaults.warm_up]\nsteps = 1", "defaults.warm_up: steps = 1 is the full weight at once"),
        ("[defaults.warm_up]\nsteps = -1", "defaults.warm_up.steps: -1 does not fit"),
        ('[defaults.warm_up]\nstarts = "now"', "'now' is not known; write 'first-request' or 'healthy'"),
        ('[defaults.warm_up]\nignore_paths = ["healthz"]', "'healthz' is no path of a URL"),
        ('[defaults.warm_up]\nignore_paths = ["/a?b"]', "ignore_paths are compared without the query"),
        ("[defaults.warm_up]\nmax_cold = 0", "it should be greater than 0"),
        ('[defaults.warm_up]\nmax_cold = "150%"', "is more than the whole"),
        ("[defaults.warm_up]\nhold_errors = -1", "defaults.warm_up.hold_errors: -1 does not fit"),
        ("[defaults.warm_up]\nhold_requests = 0", "defaults.warm_up.hold_requests: 0 does not fit"),
        ('[defaults.warm_up]\nhold_window = "10ms"', "defaults.warm_up.hold_window: '10ms' does not fit"),
        ("[defaults.warm_up]\nstep_back = 0", "defaults.warm_up.step_back: 0"),
        (
            '[defaults.outlier]\nbase = "400s"',
            "defaults.outlier: base (400 s) is longer than cap (300 s); shorten it, or lengthen cap",
        ),
        ('[upstream.a.outlier]\ncap = "20s"', "upstream.a.outlier: base (30 s) is longer than cap (20 s)"),
        (
            '[defaults.outlier]\nbase = "200s"\n[upstream.a.outlier]\ncap = "100s"',
            "upstream.a.outlier: base (200 s) is longer than cap (100 s)",
        ),
        ("[defaults.outlier]\nerrors = 1000001", "outlier.errors: 1000001 does not fit; it should be less than"),
        ("[defaults.outlier]\ntimeouts = 1000001", "outlier.timeouts: 1000001 does not fit; it should be less than"),
        ("[defaults.outlier]\nserver_errors = 1000001", "outlier.server_errors: 1000001 does not fit"),
        (
            '[defaults.health]\nflap_hold = "6m"',
            "defaults.health: flap_hold (360 s) is longer than flap_cap (300 s); shorten it, or lengthen flap_cap",
        ),
        ('[defaults.sticky]\npath = "/a;Secure"', '\'/a;Secure\' would end at ";" in a cookie; leave ";" out'),
        ("[defaults.sticky]\nmax_age = 2147483649", "sticky.max_age: 2147483649 does not fit; it should be less than"),
        (
            '[defaults.sticky]\nsame_site = "None"\nsecure = false',
            'same_site = "None" without secure is dropped by browsers; write secure = true, or same_site = "Lax"',
        ),
        ('[defaults.balance]\nmethod = "fastest"', "'fastest' is not known; write '', 'round_robin', 'least_conn'"),
        ('[defaults.balance]\nmethod = "hash"', 'method = "hash" needs a key; write key = "$remote_addr"'),
        (
            '[defaults.balance]\nmethod = "hash"\nkey = "uri"',
            "'uri' is the same for every request; write a variable of nginx",
        ),
        ('[defaults.balance]\nmethod = "hash"\nkey = "a$"', '\'a$\' has a "$" without a name; write "$name"'),
        (
            '[defaults.balance]\nmethod = "hash"\nkey = "$uri"\nbound = 0.9',
            "bound = 0.9 leaves requests without a server; write 1.25, or 0 for none",
        ),
        (
            '[defaults.balance]\nmethod = "hash"\nkey = "$uri"\nconsistent = false\nbound = 1.25',
            "bound = 1.25 needs a consistent hash; write bound = 0, or consistent = true",
        ),
        (
            '[defaults.balance]\nmethod = "ewma"\nkey = "$uri"',
            'key means nothing to method = "ewma"; take it out, or write method = "hash"',
        ),
        (
            '[defaults.balance]\nkey = "$uri"',
            'key means nothing without method; take it out, or write method = "hash"',
        ),
        ('[defaults.balance]\nmethod = "ip_hash"\nbound = 1.25', 'bound means nothing to method = "ip_hash"'),
        ('[defaults.balance]\nmethod = "hash"\nkey = "$uri"\ntwo = false', 'take it out, or write method = "random"'),
        (
            "[defaults.notices]\nenabled = true",
            'enabled without consumers; write consumers = ["http://…"], or take enabled out',
        ),
        ("[defaults.drain]\ntimeout = true", "True is no duration"),
        ("[defaults.drain]\ntimeout = inf", "inf is no duration"),
        ('[defaults.drain]\ntimeout = "0.2ms"', "'0.2ms' is out of range; write 1 ms to 10 years (87600h), or 0 for"),
        ('[defaults.drain]\ntimeout = "99999999h"', "'99999999h' is out of range; write 1 ms to 10 years"),
        ('[nginx]\nconf = "nginx.conf"', "nginx.conf: 'nginx.conf' is not an absolute path; begin it with"),
        ("[nginx]\nconf = 5", "nginx.conf: must be text; put it in quotes"),
        ("nginx = 5", "nginx: must be a table; write [nginx]"),
        ("upstream = 5", "upstream: must be a table; write [upstream]"),
        ("[upstream]\napp = 5", "upstream.app: must be a table; write [upstream.app]"),
        ("[upstream.app]\ncheck = 5", "upstream.app.check: must be a table"),
        ("[upstream.app.process]\nstrat = []", "upstream.app.process.strat: unknown key; did you mean start?"),
        ("[zzz]", "zzz: unknown key; known are api, defaults, log, nginx, readiness, store, upstream"),
        ('[api]\nlisten = "0.0.0.0:80"', "'0.0.0.0:80' is open to others; set token_file"),
        ('[api]\nlisten = "example.org:80"', "is open to others"),
        ('[api]\nlisten = "9470"', "'9470' is no address to listen on"),
        ('[store]\nurl = "etcd://x"', "'etcd://x' is no store; write"),
        ('[upstream.a.process]\nstart = "x"', 'upstream.a.process.start: must be a list; write ["…", "…"]'),
        ('[upstream.a.process]\nunit = "a@{prot}"', "{prot} is no placeholder"),
        ('[upstream.a.process]\nkind = "systemd"', 'kind = "systemd" needs a unit'),
    ],
)
def test_a_refusal_names_the_key_and_the_remedy(toml: str, message: str) -> None:
    (line,) = refusal(toml)
    assert line.startswith("headgate.toml: ")
    assert message in line


def test_an_error_in_the_defaults_is_told_once() -> None:
    assert len(refusal("[defaults.check]\nrise = 0\n[upstream.a.check]\nfall = 2\n[upstream.b.drain]\nsettle = 1")) == 1


def test_listening_beyond_loopback_wants_a_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    assert read(f'[api]\nlisten = "[::]:80"\ntoken_file = "{token}"').api.address == ("::", 80)
    assert read('[api]\nlisten = "[::1]:80"').api.address == ("::1", 80)
    assert read('[api]\nlisten = ""').api.address is None


def test_a_named_file_must_exist_and_the_default_one_need_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = str(tmp_path / "gone.toml")
    monkeypatch.setattr(settings, "DEFAULT_FILE", gone)
    assert load(environ={}) == Settings()
    with pytest.raises(SettingsError, match="no such file; create it"):
        load(gone, {})
    with pytest.raises(SettingsError, match="no such file"):
        load(environ={"HEADGATE_CONFIG": gone})
    there = tmp_path / "there.toml"
    there.write_text('[log]\nlevel = "debug"')
    assert load(environ={"HEADGATE_CONFIG": str(there)}).log.level == "debug"
    there.write_text("[log\n")
    with pytest.raises(SettingsError, match=r"there.toml: .*line 1"):
        load(str(there), {})
    with pytest.raises(SettingsError, match="Is a directory"):
        load(str(tmp_path), {})


def _keys(model: type[BaseModel], table: str = "") -> Iterator[tuple[str, str, Any]]:
    for name, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        inner = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if get_origin(field.annotation) is tuple:
            inner = None  # a list of tables; docs/hooks.md has their keys
        if name == "upstream":
            continue
        if inner:
            yield from _keys(inner, f"{table}.{name}".strip("."))
        else:
            yield table, name, field.default


def test_every_key_stands_in_the_documentation_with_its_default() -> None:
    sections = dict(re.findall(r"^## \[(.+?)\]\n(.*?)(?=^## |\Z)", DOCS.read_text(), re.MULTILINE | re.DOTALL))
    documented = {
        (table, key): default
        for table, text in sections.items()
        for key, default in re.findall(r"^\| `(\w+)` \| (.+?) \|", text, re.MULTILINE)
    }
    known = {(table, key): default for table, key, default in _keys(Settings)}
    assert documented.keys() == known.keys()
    for (table, key), default in known.items():
        if default is not None:
            shown = documented[table, key].strip("`")
            assert getattr(_at(read(f"[{table}]\n{key} = {shown}"), table), key) == default, (table, key)


def _at(model: object, path: str) -> object:
    for part in path.split("."):
        model = getattr(model, part)
    return model


@pytest.mark.parametrize(
    ("toml", "place"),
    [
        ('[upstream.app.sticky]\ncookie = "route"', "upstream.app.sticky.cookie"),
        ('[defaults.balance]\nmethod = "ewma"', "defaults.balance.method"),
    ],
)
def test_what_only_the_lua_plane_can_do_is_refused_on_the_other(toml: str, place: str) -> None:
    read(toml)
    with pytest.raises(SettingsError, match=rf"{place} = .* needs the Lua data plane"):
        read(f'[nginx]\ndata_plane = "reload"\n{toml}')
