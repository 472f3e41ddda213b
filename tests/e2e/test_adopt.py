"""Somebody's own nginx, taken over and given back: under traffic, with the real command, nginx and daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller import adopt as adoption
from controller.adapters.nginx import verify
from controller.settings import Settings, load
from tests.support.nginx import missing_parts, wait_until
from tests.support.site import Site

pytestmark = pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "")

APP = {"etc/nginx.conf", "etc/conf.d/10-app.conf", "headgate/nginx-http.conf"}
NAMES = APP | {"etc/conf.d/30-legacy.conf", "etc/sites-available/api", "etc/sites-enabled/api"}


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as written:
        written.start()
        yield written


@contextlib.contextmanager
def traffic(site: Site) -> Iterator[list[tuple[int, str]]]:
    """One-shot requests without a pause, of which none may fail; status and port of each as they come."""
    answers: list[tuple[int, str]] = []
    errors: list[OSError] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                answers.append(site.get())
            except OSError as error:
                errors.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        yield answers
    finally:
        stop.set()
        thread.join()
    assert errors == []
    assert {status for status, _ in answers} == {200}
    assert len(answers) > 20


def settings(site: Site, **nginx: str) -> Settings:
    loaded = load(str(site.settings), {})
    return loaded.model_copy(update={"nginx": loaded.nginx.model_copy(update=nginx)})


def test_the_diff_shows_three_lines_and_changes_nothing(site: Site) -> None:
    done = site.headgate("adopt", "--diff")
    assert (done.returncode, done.stderr) == (0, "")
    added = [line[1:].strip() for line in done.stdout.splitlines() if line[:1] == "+" and line[:3] != "+++"]
    assert sorted(added) == [
        'balancer_by_lua_block { require("headgate").balance("app") }',
        'balancer_by_lua_block { require("headgate").balance("legacy") }',
        f'include "{site.include}";',
        f"upstream api {{ server {site.addresses[0]}; server {site.addresses[1]}; "
        'balancer_by_lua_block { require("headgate").balance("api") } }',
    ]
    assert f'{site.conf.parent}/conf.d/40-zoned.conf:2: upstream "zoned" has a zone' in done.stdout
    assert site.changed() == set()
    assert not site.include.parent.exists()


def test_adopt_servers_live_and_release_with_no_request_lost(site: Site) -> None:
    first, _, third = site.addresses
    before = site.accepting()
    with traffic(site) as answers:
        done = site.headgate("adopt", "--yes")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-2] == "adopted: app, legacy, api"
        assert site.changed() == NAMES
        workers = site.accepting()
        assert not workers & before, "the verified reload"
        assert (site.conf.parent / "sites-enabled" / "api").is_symlink()

        site.start_daemon()
        up = dict.fromkeys(site.addresses, 1)
        wait_until(
            lambda: {each: server["effective_weight"] for each, server in site.status().items()} == up, "all are up", 30
        )
        site.shares(30)
        wait_until(lambda: sum(s["requests"] for s in site.status().values()) >= 30, "Lua counts the requests")

        def live(*words: str) -> None:
            done = site.headgate("server", *words, "--yes")
            assert (done.returncode, done.stderr) == (0, ""), done
            assert done.stdout.splitlines()[-1].startswith("nginx follows it (table ")
            assert site.accepting() == workers, "without a reload"

        def shares() -> dict[int, float]:
            """Every server's part of what all clients send: of two that take turns, each alone may hit one phase."""
            began = len(answers)
            together = site.shares(60) + Counter(int(port) for _, port in answers[began:])
            return {port: count / together.total() for port, count in together.items()}

        live("remove", "app", third)
        assert set(shares()) == set(site.ports[:2])
        live("add", "app", third, "weight=2", "max_fails=1")
        wait_until(lambda: site.status()[third]["effective_weight"] == 2, "the new server is up", 20)
        assert shares()[site.ports[2]] == pytest.approx(2 / 4, abs=0.05)
        live("set", "app", third, "weight=", "max_fails=")
        assert shares()[site.ports[2]] == pytest.approx(1 / 3, abs=0.05)
        live("set", "app", first, "down", "weight=5")
        assert set(shares()) == set(site.ports[1:])
        live("set", "app", first, "down=", "weight=1")
        assert b"max_fails" not in (site.conf.parent / "conf.d" / "10-app.conf").read_bytes()

        done = site.headgate("release", "--yes")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1] == "released: app, legacy, api"
        assert not site.accepting() & workers
        assert site.changed() == {"etc/conf.d/10-app.conf"}, "the server lines stay as they were set"
    assert set(site.shares()) == set(site.ports)


def test_release_gives_every_file_back_byte_for_byte(site: Site) -> None:
    assert site.headgate("adopt", "--yes", "app").returncode == 0
    assert site.changed() == APP
    assert site.headgate("adopt", "--yes").returncode == 0
    assert site.changed() == NAMES
    assert site.headgate("release", "--yes").returncode == 0
    assert site.changed() == set()


def test_whatever_is_done_already_is_not_done_again(site: Site) -> None:
    done = site.headgate("release", "--yes")
    assert (done.returncode, done.stdout) == (0, "there is nothing to do: everything that can be is released already\n")
    assert site.headgate("adopt", "--yes").returncode == 0
    workers, files = site.accepting(), site.files()
    done = site.headgate("adopt", "--yes", "api", "app", "legacy")
    assert done.returncode == 0
    assert done.stdout == "there is nothing to do: everything that can be is adopted already\n"
    assert (site.accepting(), site.files()) == (workers, files)


def test_without_a_yes_nothing_is_written(site: Site) -> None:
    for answer in ("", "n\n"):
        assert site.headgate("adopt", input=answer).returncode == 1
    assert site.changed() == set()
    assert site.headgate("adopt", input="y\n").returncode == 0
    assert site.changed() == NAMES


def test_somebody_who_edits_meanwhile_keeps_the_edit_and_is_asked_again(site: Site) -> None:
    command = [sys.executable, "-m", "controller", "--config", str(site.settings), "adopt"]
    adopting = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert adopting.stdin is not None
    assert adopting.stdout is not None
    try:
        shown = b""
        while not shown.endswith(b"reload nginx? [y/N]: "):
            byte = adopting.stdout.read(1)
            assert byte, shown
            shown += byte
        path = site.conf.parent / "conf.d" / "10-app.conf"
        path.write_bytes(b"# by hand\n" + path.read_bytes())
        out, errors = adopting.communicate(b"y\ny\n", timeout=30)
    finally:
        adopting.kill()
        adopting.wait()
    assert adopting.returncode == 0
    assert b"10-app.conf was changed after it was read; nothing was written; planned again" in errors
    assert b"@@ -6,6 +6,7 @@" in out, "the lines of the file as it is now"
    assert site.headgate("release", "--yes").returncode == 0
    assert site.changed() == {"etc/conf.d/10-app.conf"}
    assert path.read_bytes() == b"# by hand\n" + site.before["etc/conf.d/10-app.conf"]


def test_what_nginx_does_not_take_goes_back_and_its_own_line_is_shown() -> None:
    with Site(http="    lua_shared_dict headgate_state 2m;\n") as site:
        site.start()
        workers = site.accepting()
        done = site.headgate("adopt", "--yes")
        assert done.returncode == 1
        assert '[emerg] the size 2097152 of shared memory zone "headgate_state" conflicts' in done.stderr
        assert f"in {site.conf}:" in done.stderr
        assert "every file is as it was before" in done.stderr
        assert (site.changed(), site.accepting()) == (set(), workers)
        assert set(site.shares()) == set(site.ports)


def test_a_configuration_that_is_bad_already_is_said_to_be(site: Site) -> None:
    path = site.conf.parent / "conf.d" / "50-bad.conf"
    path.write_text("upstream bad { server 127.0.0.1:1; nonsense; }\n")
    done = site.headgate("adopt", "--yes", "app")
    assert done.returncode == 1
    assert (
        f'nginx does not take its configuration as it is: [emerg] unknown directive "nonsense" in {path}:1'
        in done.stderr
    )
    path.write_text("upstream bad {")
    done = site.headgate("adopt", "--yes")
    assert done.returncode == 1
    assert f"{path}:1" in done.stderr
    path.unlink()
    assert site.changed() == set()


def test_without_a_running_nginx_the_files_wait_for_it() -> None:
    with Site() as site:
        done = site.headgate("adopt", "--yes")
        assert (done.returncode, done.stderr) == (0, "")
        assert "nginx does not run; it will start with this" in done.stdout
        site.start()
        assert set(site.shares()) == set(site.ports)
        assert site.headgate("release", "--yes").returncode == 0
        assert site.changed() == set()


def test_nginx_starts_again_with_the_adoption_after_a_power_cut(site: Site) -> None:
    assert site.headgate("adopt", "--yes").returncode == 0
    site.kill_nginx()
    site.start()
    assert set(site.shares()) == set(site.ports)


def test_a_table_of_an_earlier_adoption_does_not_come_into_force(site: Site) -> None:
    snapshot = Path(settings(site).nginx.snapshot)
    snapshot.write_text(
        '{"format":1,"revision":9,"upstreams":{"app":{"method":"round_robin","fail_open":false,"servers":[{"key":"x",'
        f'"ip":"127.0.0.1","port":{site.ports[0]},"weight":1,"state":"up","backup":false,"max_conns":0}}]}}}}}}'
    )
    assert site.headgate("adopt", "--yes").returncode == 0
    assert set(site.shares()) == set(site.ports)


async def test_a_reload_that_cannot_be_proved_puts_every_file_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "RELOAD_TIMEOUT", 0.3)
    wanted = adoption.adoption(settings(site))
    os.kill(site.nginx.pid, signal.SIGSTOP)
    try:
        with pytest.raises(verify.ReloadFailed, match=r"no new worker has come; every file is as it was before"):
            await adoption.carry_out(settings(site), wanted, lambda _: None)
    finally:
        os.kill(site.nginx.pid, signal.SIGCONT)
    assert site.changed() == set()


async def test_a_control_socket_that_does_not_answer_puts_files_and_nginx_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "RELOAD_TIMEOUT", 1.0)
    wrong = settings(site, control=str(site.prefix / "run" / "other.sock"))
    wanted = adoption.adoption(settings(site))
    with pytest.raises(
        verify.ReloadFailed, match=r"other\.sock.*every file is as it was before, and nginx was reloaded"
    ):
        await adoption.carry_out(wrong, wanted, lambda _: None)
    assert site.changed() == set()
    assert set(site.shares()) == set(site.ports)
    wait_until(lambda: not Path(settings(site).nginx.control).exists(), "nginx has closed its control socket")


def test_an_adoption_that_was_killed_is_undone_by_the_next_command(site: Site) -> None:
    code = (
        "import asyncio, os, signal, sys\nfrom controller import adopt, settings\n"
        "from controller.adapters.nginx import check\n"
        "async def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "check.check = die\nloaded = settings.load(sys.argv[1])\n"
        "asyncio.run(adopt.carry_out(loaded, adopt.adoption(loaded), print))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(site.settings)], timeout=30, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert site.changed() >= NAMES
    done = site.headgate("release", "--yes")
    assert done.returncode == 0
    assert done.stdout.startswith("an interrupted change of ")
    assert site.changed() == set()


def test_the_reload_plane_needs_one_include_and_gives_everything_back(site: Site) -> None:
    reload = settings(site, data_plane="reload")
    lua = settings(site)
    said: list[str] = []

    def carry_out(chosen: Settings, wanted: adoption.Plan) -> None:
        asyncio.run(adoption.carry_out(chosen, wanted, said.append))

    carry_out(reload, adoption.adoption(reload))
    assert site.changed() == {"etc/nginx.conf"}
    assert f'+    include "{reload.nginx.version_file}";' in _diff(site)
    assert said[-1].startswith(f"nginx was reloaded: master {site.nginx.pid} stayed")
    assert adoption.adoption(reload).writes == ()
    with pytest.raises(adoption.CannotAdopt, match="leave the names out"):
        adoption.adoption(reload, ["app"])

    carry_out(lua, adoption.adoption(lua))
    assert site.changed() == NAMES
    assert "version.conf" not in _diff(site)
    assert set(site.shares()) == set(site.ports)
    carry_out(reload, adoption.adoption(reload))
    assert site.changed() == {"etc/nginx.conf"}
    carry_out(reload, adoption.release(reload))
    assert site.changed() == set()
    assert not Path(reload.nginx.version_file).exists()


def _diff(site: Site) -> str:
    before = site.before["etc/nginx.conf"].decode().splitlines()
    return "\n".join(f"+{line}" for line in site.conf.read_text().splitlines() if line not in before)


def test_servers_are_not_changed_where_that_cannot_be_followed(site: Site) -> None:
    first, second, third = site.addresses
    absent = site.headgate("server", "remove", "app", first, "--yes")
    assert absent.returncode == 3
    assert "headgate run" in absent.stderr
    assert site.changed() == set()
    assert site.headgate("adopt", "--yes").returncode == 0
    site.start_daemon()
    wait_until(lambda: len(site.status()) == 3, "the daemon knows them", 20)
    before = site.files()
    for words, code, text in [
        (("remove", "zoned", first), 2, "zoned"),
        (("remove", "app", "10.0.0.1:1"), 2, "has no server 10.0.0.1:1"),
        (("add", "app", first), 1, "is a server of upstream"),
        (("add", "app", "10.0.0.1:1", "weight=0"), 2, 'no parameter "weight=0"'),
        (("set", "app", first, "slow_start=3s"), 2, 'no parameter "slow_start=3s"'),
        (("set", "app", first), 2, "set needs parameters"),
        (("remove", "app", first, "weight=1"), 2, "takes no parameters"),
        (("set", "app", first, "weight=1", "weight=2"), 2, "named twice"),
    ]:
        done = site.headgate("server", *words, "--yes")
        assert (words, done.returncode) == (words, code), done
        assert text in done.stderr, done
    shown = site.headgate("server", "add", "app", "unix:/run/a b.sock", "backup", "--diff")
    assert shown.returncode == 0
    assert '+\tserver "unix:/run/a b.sock" backup;' in shown.stdout
    assert site.files() == before
    for address in (first, second):
        assert site.headgate("maint", "app", address).returncode == 0
    refused = site.headgate("server", "remove", "app", third, "--yes")
    assert (refused.returncode, site.files()) == (4, before)
    assert "--force" in refused.stderr
    assert site.headgate("server", "set", "app", third, "down", "--yes").returncode == 4
    assert site.headgate("server", "remove", "app", third, "--yes", "--force").returncode == 0
