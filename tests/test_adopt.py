"""What can be adopted and what not, each with file, line and remedy; and that following the remedy is enough."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller import adopt
from controller.adapters.clock import SystemClock
from controller.adapters.nginx import check
from controller.adapters.nginx.memory import Memory
from controller.conf.draft import EditRefused
from controller.conf.edit import SetParameter
from controller.conf.ledger import Entry, Ledger
from controller.ports import ConfigError
from controller.resources import lua_dir
from controller.settings import Settings, load
from tests.support.nginx import missing_parts
from tests.support.site import Site

pytestmark = pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "")


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as written:
        yield written


def settings(site: Site) -> Settings:
    return load(str(site.settings), {})


def write(site: Site, name: str, text: str) -> str:
    path = site.conf.parent / name
    path.write_text(text)
    return str(path)


def obstacle(site: Site, *names: str) -> str:
    with pytest.raises(adopt.CannotAdopt) as caught:
        adopt.adoption(settings(site), names)
    return caught.value.message


def carry_out(site: Site, wanted: adopt.Plan) -> None:
    """Write it and have nginx judge it; nginx does not run."""
    asyncio.run(adopt.carry_out(settings(site), wanted, lambda _: None))


def test_all_that_can_be_is_adopted_and_the_rest_named_with_the_reason(site: Site) -> None:
    wanted = adopt.adoption(settings(site))
    assert sorted(wanted.upstreams) == ["api", "app", "legacy"]
    (zoned,) = wanted.left
    conf_d = site.conf.parent / "conf.d"
    assert zoned.startswith(f'{conf_d}/40-zoned.conf:2: upstream "zoned" has a zone, in which no Lua balancer can work')


def test_only_what_is_named_is_adopted(site: Site) -> None:
    assert adopt.adoption(settings(site), ["api"]).upstreams == ("api",)
    assert 'upstream "zoned" has a zone' in obstacle(site, "app", "zoned")
    with pytest.raises(EditRefused, match=r'no upstream "nope" .*there are: .*app'):
        adopt.adoption(settings(site), ["app", "nope"])


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("server 10.0.0.1;\n\nsticky cookie x;", ':3: .*balanced by sticky cookie x, .*choose data_plane = "reload"'),
        ("least_time header; server 10.0.0.1;", ":1: .*balanced by least_time header"),
        ("server 10.0.0.1;\nrandom two least_time=header;", ":2: .*balanced by random two least_time=header"),
        ("zone z 64k; state /var/lib/x.state;", ":1: .*has a zone"),
        ("state /var/lib/x.state;", ":1: .*write server lines"),
        ("server $host;", ":1: .*write the address"),
        ("server a.example service=http resolve;", ":1: .*SRV"),
        ("server unix:app.sock;", ':1: .*write it from "/" on'),
        ("server 10.0.0.1;\nbalancer_by_lua_block { mine() }", ":2: .*did not write; take it out by hand"),
        ("server 10.0.0.1;\nkeepalive 4;\nleast_conn;", ":3: .*stands behind keepalive"),
    ],
)
def test_an_upstream_that_cannot_be_adopted_is_left_with_file_line_and_remedy(
    site: Site, block: str, reason: str
) -> None:
    path = write(site, "conf.d/15-other.conf", f"upstream other {{ {block} }}")
    with pytest.raises(adopt.CannotAdopt, match=f"{path}{reason}"):
        adopt.adoption(settings(site), ["other"])
    wanted = adopt.adoption(settings(site))
    assert sorted(wanted.upstreams) == ["api", "app", "legacy"]
    assert any(each.startswith(path) for each in wanted.left)


@pytest.mark.parametrize(
    "method", ["least_conn", "ip_hash", "hash $cookie_id$uri", 'hash "${uri} x" consistent', "random two least_conn"]
)
@pytest.mark.parametrize("block", ["{}; server 10.0.0.1; keepalive 4;", "server 10.0.0.1;\n{};"])
def test_an_upstream_with_a_method_that_lua_knows_is_adopted_and_nginx_takes_the_hook_behind_it(
    site: Site, method: str, block: str
) -> None:
    path = write(site, "conf.d/15-other.conf", f"upstream other {{ {block.format(method)} }}")
    wanted = adopt.adoption(settings(site), ["other"])
    assert wanted.upstreams == ("other",)
    told = any(f'upstream "other" by round robin and not by {method.split()[0]}' in note for note in wanted.notes)
    assert told == ("hash" in method)
    carry_out(site, wanted)
    after = Path(path).read_text()
    assert max(after.index("server 10.0.0.1"), after.index(method)) < after.index("balancer_by_lua_block")


OWN_LUA = """\
init_by_lua_block { cache = {} }
init_worker_by_lua_block {
    -- require("headgate").init_worker() in a comment does not count
    started = true
}
lua_package_path "/opt/lua/?.lua;;";
log_by_lua_block { counted = true }
"""


def test_own_hooks_in_http_are_each_named_with_what_to_put_into_them(site: Site) -> None:
    path = write(site, "conf.d/00-lua.conf", OWN_LUA)
    lines = obstacle(site).splitlines()
    nginx = settings(site).nginx
    init = f'require("headgate").init {{ socket = "{nginx.control}", snapshot = "{nginx.snapshot}" }}'
    one = "of its own, and nginx takes one; put"
    assert lines[1:] == [
        f"  {path}:1: http has a init_by_lua_block {one} into it: {init}",
        f'  {path}:2: http has a init_worker_by_lua_block {one} into it: require("headgate").init_worker()',
        f'  {path}:7: http has a log_by_lua_block {one} into it: require("headgate").log()',
        f"  {path}:6: http has a lua_package_path {one} in front of it: {lua_dir()}/?.lua;{lua_dir()}/?/init.lua;",
    ]


def test_once_they_are_merged_nginx_takes_the_adoption_and_release_asks_for_them_back(site: Site) -> None:
    nginx = settings(site).nginx
    init = f'require("headgate").init {{ socket = "{nginx.control}", snapshot = "{nginx.snapshot}" }}'
    merged = (
        OWN_LUA.replace("cache = {}", f"cache = {{}} {init}")
        .replace("    started", '    require("headgate").init_worker() started')
        .replace('"/opt', f'"{lua_dir()}/?.lua;{lua_dir()}/?/init.lua;/opt')
        .replace("counted", 'require("headgate").log() counted')
    )
    path = write(site, "conf.d/00-lua.conf", merged)
    carry_out(site, adopt.adoption(settings(site)))
    include = site.include.read_text()
    for name in ("init_by_lua", "init_worker_by_lua", "log_by_lua_block", "lua_package_path"):
        assert name not in include
    assert "lua_shared_dict headgate_table" in include
    assert adopt.adoption(settings(site)).writes == ()
    with pytest.raises(adopt.CannotAdopt) as refused:
        adopt.release(settings(site))
    assert [line.split(": ")[0].strip() for line in refused.value.message.splitlines()[1:]] == [
        f"{path}:1",
        f"{path}:2",
        f"{path}:7",
    ]
    write(site, "conf.d/00-lua.conf", "")
    carry_out(site, adopt.release(settings(site)))
    assert site.changed() == {"etc/conf.d/00-lua.conf"}


def test_a_bucket_size_of_the_users_own_stays_and_ours_is_left_out(site: Site) -> None:
    path = write(site, "conf.d/00-hash.conf", "proxy_headers_hash_bucket_size 512;\n")
    wanted = adopt.adoption(settings(site))
    assert any(note.startswith(f"{path}:1: to hide Sermant's marks") for note in wanted.notes)
    carry_out(site, wanted)
    assert "proxy_headers_hash_bucket_size 1024" not in site.include.read_text()
    write(site, "conf.d/00-hash.conf", "proxy_headers_hash_bucket_size 1024;\n")
    assert not any("Sermant" in note for note in adopt.adoption(settings(site)).notes)


def test_a_block_that_hides_headers_of_its_own_is_said_once(site: Site) -> None:
    hides = "proxy_hide_header X-One; proxy_hide_header X-Two;"
    own = f"{hides} location / {{ {hides} proxy_hide_header X-Headgate-Offline; }}"
    path = write(site, "conf.d/hides.conf", f"server {{ listen 127.0.0.1:1; {own} }}\n")
    notes = [note for note in adopt.adoption(settings(site)).notes if "proxy_hide_header" in note]
    assert len(notes) == 1
    assert notes[0].startswith(f"{path}:1: this proxy_hide_header replaces ours")


def test_code_in_a_file_of_its_own_is_looked_into(site: Site) -> None:
    code = write(site, "init.lua", "cache = {}")
    path = write(site, "conf.d/00-lua.conf", f"init_worker_by_lua_file '{code}';")
    assert f"{path}:1: http has a init_worker_by_lua_file" in (text := obstacle(site))
    assert f"put into the file {code}, named by its absolute path: " in text
    write(site, "init.lua", 'local h = require "headgate"\nh.init_worker()')
    assert sorted(adopt.adoption(settings(site)).upstreams) == ["api", "app", "legacy"]


def test_a_location_with_a_log_by_lua_of_its_own_keeps_the_upstream_that_it_leads_to(site: Site) -> None:
    path = write(
        site,
        "conf.d/50-server.conf",
        "server {\n  listen 127.0.0.1:1;\n  log_by_lua_block { mine() }\n"
        "  location /a { proxy_pass http://app/x; }\n"
        '  location /b { log_by_lua_block { require("headgate").log() } proxy_pass http://api; }\n'
        "  location /c { log_by_lua_block { mine() } return 204; }\n}\n",
    )
    wanted = adopt.adoption(settings(site))
    assert wanted.upstreams == ("legacy", "api")
    (reason,) = (each for each in wanted.left if '"app"' in each)
    assert reason.startswith(f"{path}:3: this log_by_lua_block replaces the one that ends the count of each request")
    assert 'put into it: require("headgate").log()' in reason
    (note,) = (each for each in wanted.notes if path in each)
    assert note.startswith(f"{path}:6: ")
    write(site, "conf.d/50-server.conf", Path(path).read_text().replace("mine()", 'require("headgate").log() mine()'))
    wanted = adopt.adoption(settings(site))
    assert sorted(wanted.upstreams) == ["api", "app", "legacy"]
    assert not any(path in note for note in wanted.notes)


def test_a_location_whose_target_is_a_variable_may_lead_to_any_upstream(site: Site) -> None:
    text = "server { listen 127.0.0.1:1; location / { log_by_lua_block { mine() } proxy_pass http://$where; } }"
    path = write(site, "conf.d/50-server.conf", text)
    assert f"{path}:1: this log_by_lua_block replaces" in obstacle(site)


def test_an_upstream_is_the_same_one_in_other_letters(site: Site) -> None:
    text = "server { listen 127.0.0.1:1; location / { log_by_lua_block { mine() } proxy_pass http://APP; } }"
    path = write(site, "conf.d/50-server.conf", text)
    (reason,) = (each for each in adopt.adoption(settings(site)).left if path in each)
    assert 'for upstream "app"' in reason


def test_names_that_are_no_utf_8_are_left_to_nginx_and_no_obstacle_to_others(site: Site) -> None:
    path = site.conf.parent / "conf.d" / "60-latin.conf"
    path.write_bytes(b"upstream caf\xe9 { server 127.0.0.1:1; }\nupstream l { server unix:/tmp/caf\xe9.sock; }\n")
    site.before = site.files()
    for plane in ("lua", "reload"):
        site.settings.write_text(site.settings.read_text().replace('"lua"', f'"{plane}"'))
        done = site.headgate("adopt", "--yes")
        assert done.returncode == 0, done.stdout + done.stderr
        if plane == "lua":
            assert f'{path}:1: upstream "caf\\udce9" has a name that is no UTF-8' in done.stdout
            assert f'{path}:2: upstream "l" has a server with a name that is no UTF-8' in done.stdout
        done = site.headgate("release", "--yes")
        assert done.returncode == 0, done.stdout + done.stderr
        assert site.changed() == set()


@pytest.mark.parametrize("plane", ["lua", "reload"])
def test_a_reload_that_a_killed_command_owes_is_made_good(plane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Site(plane=plane) as site:
        site.start()

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        for verb, planned in (("adopt", adopt.adoption), ("release", adopt.release)):
            before = site.accepting()
            wanted = planned(settings(site))
            with monkeypatch.context() as patch:
                patch.setattr(adopt, "_turn_over", killed)
                with pytest.raises(KeyboardInterrupt):
                    carry_out(site, wanted)
            assert site.accepting() == before
            assert "may not have loaded" in site.headgate(verb, "--diff").stdout
            done = site.headgate(verb, "--yes")
            assert done.returncode == 0, done.stdout + done.stderr
            assert "nginx was reloaded" in done.stdout
            assert not site.accepting() & before
            done = site.headgate(verb, "--yes")
            assert "nginx was reloaded" not in done.stdout, "once"
        assert site.changed() == set()


def test_without_code_cache_nothing_can_be_adopted(site: Site) -> None:
    path = write(site, "conf.d/50-server.conf", "server { listen 127.0.0.1:1;\nlua_code_cache off; }")
    assert f"{path}:2: lua_code_cache off forgets what Headgate knows; take it out" in obstacle(site)


def test_a_module_that_is_not_loaded_is_named_with_what_loads_it() -> None:
    with Site(module="") as site:
        message = obstacle(site)
        remedy = message.partition("put at its top: ")[2]
        assert f"{site.conf}: nginx loads no Lua module; " in message
        site.conf.write_text(f"{remedy}\n{site.conf.read_text()}")
        carry_out(site, adopt.adoption(settings(site)))


def test_a_module_that_is_not_installed_is_named_with_the_packages(tmp_path: Path) -> None:
    install = "install it: apt install libnginx-mod-http-lua lua-resty-core lua-cjson"
    assert check.lua_module(f"configure arguments: --modules-path={tmp_path}") == install
    assert check.lua_module("configure arguments: --with-stream") == install
    assert check.lua_module("configure arguments: --add-module=../ngx_lua-0.10.26 --modules-path=/x") == ""


def test_what_somebody_has_included_by_hand_is_not_included_twice(site: Site) -> None:
    carry_out(site, adopt.adoption(settings(site), ["app"]))
    text = site.include.read_text()
    carry_out(site, adopt.release(settings(site)))
    write(site, "conf.d/00-headgate.conf", text)
    wanted = adopt.adoption(settings(site))
    assert not any(each.path in (str(site.include), str(site.conf)) for each in wanted.writes)
    carry_out(site, wanted)
    carry_out(site, adopt.release(settings(site)))
    assert site.changed() == {"etc/conf.d/00-headgate.conf"}


def test_a_changed_setting_is_brought_into_the_include(site: Site) -> None:
    carry_out(site, adopt.adoption(settings(site)))
    moved = str(site.prefix / "run" / "moved.sock")
    site.settings.write_text(site.settings.read_text().replace("/run/nginx.sock", "/run/moved.sock"))
    wanted = adopt.adoption(settings(site))
    assert [each.path for each in wanted.writes] == [str(site.include)]
    carry_out(site, wanted)
    assert moved in site.include.read_text()


def test_a_socket_under_run_is_noted_with_the_line_that_keeps_its_directory(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopt, "_TMPFILES", (str(site.prefix),))
    loaded = settings(site)
    under = loaded.model_copy(update={"nginx": loaded.nginx.model_copy(update={"control": "/run/hg test/nginx.sock"})})
    (note,) = adopt.adoption(under).notes
    assert note.startswith("/run/hg test is gone after a reboot, and without it nginx does not start; ")
    line = note.partition("'")[2].partition("'")[0]
    (site.prefix / "headgate.conf").write_text(line + "\n")
    assert adopt.adoption(under).notes == ()
    assert adopt.adoption(loaded).notes == ()


def test_a_configuration_that_cannot_be_read_names_file_and_line(site: Site) -> None:
    path = write(site, "conf.d/50-bad.conf", "upstream x {\n  server 10.0.0.1\n}")
    for planned in (adopt.adoption, adopt.release):
        with pytest.raises(ConfigError, match=f"{path}:3"):
            planned(settings(site))


def test_release_gives_back_what_the_reload_plane_wrote_into_the_lines(site: Site) -> None:
    first, second, third = site.addresses
    app = site.conf.parent / "conf.d" / "10-app.conf"
    text = app.read_text().replace(f"{first} weight=1", f"{first} weight=25").replace(f"'{second}'", f"'{second}' down")
    app.write_text(text.replace("max_fails=2", "max_fails=0"))
    entries = {
        ("app", first, 0, "weight"): Entry("1", ("25",)),
        ("app", second, 0, "down"): Entry(None, ("",)),
        ("app", third, 0, "max_fails"): Entry("2", ("1",)),
    }
    state = settings(site).nginx_state
    Memory(ledger=Ledger(entries)).save(state, SystemClock())
    carry_out(site, adopt.release(settings(site)))
    assert app.read_bytes() == site.before["etc/conf.d/10-app.conf"].replace(b"max_fails=2", b"max_fails=0"), (
        "what somebody has changed since is theirs"
    )
    assert not state.exists()


def test_what_the_reload_plane_holds_is_wished_and_not_written() -> None:
    with Site(plane="reload") as site:
        first, second, _ = site.addresses
        app = site.conf.parent / "conf.d" / "10-app.conf"
        app.write_text(app.read_text().replace(f"{first} weight=1", f"{first} weight=25 down"))
        entries = {("app", first, 0, "weight"): Entry("1", ("25",)), ("app", first, 0, "down"): Entry(None, ("",))}
        Memory(ledger=Ledger(entries)).save(settings(site).nginx_state, SystemClock())
        wishes = [
            SetParameter("app", first, "weight", "3"),
            SetParameter("app", first, "down", None),
            SetParameter("app", first, "max_fails", "4"),
            SetParameter("app", second, "weight", "5"),
        ]
        planned = adopt.servers(settings(site), wishes)
        assert planned.meant == (SetParameter("app", first, "weight", "3", 0),)
        (edit,) = planned.writes
        assert edit.after is not None
        assert f"{first} weight=25 down max_fails=4; server '{second}' weight=5;" in edit.after.decode()
        assert f"{first} of app: weight=3, as soon as Headgate's own weight goes" in planned.shown()


def test_a_configuration_without_upstreams_has_nothing_to_adopt(site: Site) -> None:
    site.conf.write_text(site.conf.read_text().replace("include 'conf.d", "#").replace('include "sites-enabled', "#"))
    assert obstacle(site).endswith(f"no upstream is in the http block of {site.conf}; write one with your servers")


def test_an_include_that_lua_needs_stands_before_the_hooks_and_goes_after_them(site: Site) -> None:
    adopted = [each.path for each in adopt.adoption(settings(site)).writes]
    assert adopted[:2] == [str(site.include), str(site.conf)]
    carry_out(site, adopt.adoption(settings(site)))
    released = [each.path for each in adopt.release(settings(site)).writes]
    assert released[-2:] == [str(site.conf), str(site.include)]


def test_after_every_single_write_of_an_adoption_nginx_could_start(site: Site) -> None:
    lua, plain = site.settings.read_text(), site.settings.read_text().replace('"lua"', '"reload"')
    for text, planned in (
        (lua, adopt.adoption),
        (plain, adopt.adoption),
        (lua, adopt.adoption),
        (lua, adopt.release),
        (plain, adopt.adoption),
        (plain, adopt.release),
    ):
        site.settings.write_text(text)
        wanted = planned(settings(site)).writes
        assert wanted
        for each in wanted:
            path = Path(each.path).resolve()
            path.parent.mkdir(exist_ok=True)
            if each.after is None:
                path.unlink()
            else:
                path.write_bytes(each.after)
            command = ["nginx", "-t", "-e", f"{site.prefix}/error.log", "-c", str(site.conf)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (each.path, done.stderr)
    assert site.changed() == set()
