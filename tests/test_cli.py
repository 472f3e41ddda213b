"""The command as people run it, a process of its own at a real daemon's socket; and docs/command.md names it all."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main

from controller.cli import app
from controller.core.policy import WarmUpPolicy
from tests.support.house import APP, POLICY, House

FIRST, SECOND, THIRD = (server.key for server in APP.servers)
DOCS = Path(__file__).parents[1] / "docs" / "command.md"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    (tmp_path / "headgate.toml").write_text(f'[api]\nsocket = "{tmp_path}/run/api.sock"\nlisten = ""\n')
    with House(tmp_path) as started:
        yield started


def command(directory: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "controller", "--config", f"{directory}/headgate.toml", *words]


def headgate(house: House, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(house.directory, *words), capture_output=True, text=True, timeout=30)


def rows(text: str) -> dict[str, list[str]]:
    """A table's rows by their first word."""
    return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


def test_status_shows_each_server_in_aligned_columns_without_colours(house: House) -> None:
    done = headgate(house, "status")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "app: 3 of 3 servers serving" in done.stdout.splitlines()
    assert "nginx.conf read" in done.stdout.splitlines()[0]
    header, *lines = [line for line in done.stdout.splitlines() if line.startswith(("SERVER", "127."))][:4]
    assert header.split() == [
        "SERVER",
        "ADMIN",
        "HEALTH",
        "WEIGHT",
        "WARM-UP",
        "IN",
        "FLIGHT",
        "REQUESTS",
        "FAILURES",
        "CHANGE",
    ]
    assert [line.split()[:2] for line in lines] == [[FIRST, "ready"], [SECOND, "ready"], [THIRD, "ready"]]
    assert {line.index("ready") for line in lines} == {header.index("ADMIN")}


def test_status_shows_what_is_wrong(house: House) -> None:
    house.prober.down.add(FIRST)
    house.do(lambda: house.prober.probe_now("app", FIRST))
    house.until(lambda: house.runtime.state.groups["app"].peers[FIRST].health == "down")
    assert headgate(house, "maint", "app", SECOND).returncode == 0
    shown = headgate(house, "status").stdout
    assert "app: 1 of 3 servers serving" in shown
    assert rows(shown)[FIRST][2] == "down"
    assert rows(shown)[SECOND][1] == "maint"
    assert "1 → 0" in next(line for line in shown.splitlines() if line.startswith(SECOND))


def test_status_as_json_is_the_answer_of_the_api(house: House) -> None:
    answer = json.loads(headgate(house, "status", "--json").stdout)
    assert list(answer) == ["revision", "data_plane", "offline", "config", "upstreams"]


def test_drain_answers_at_once_and_with_wait_when_the_server_is_empty(house: House) -> None:
    house.plane.busy[FIRST] = 1
    done = headgate(house, "drain", "app", FIRST)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"app: {FIRST} drains; no new request reaches it \(table \d+, change 1\)\n", done.stdout)
    late = headgate(house, "drain", "app", FIRST, "--wait", "--timeout", "0.1")
    assert late.returncode == 1
    assert "change 2 goes on in the daemon; follow it with: headgate changes 2 --wait" in late.stderr
    house.plane.busy.clear()
    followed = headgate(house, "changes", "2", "--wait")
    assert followed.returncode == 0
    assert followed.stdout.splitlines()[-1].startswith("change 2: drain of app done in")


def test_enable_and_maint_wait_for_what_they_promise_and_say_what_for(house: House) -> None:
    assert house.runtime.counters.upstreams["app"][FIRST].in_flight == 0
    house.plane.busy[FIRST] = 2  # since the counters were read last
    late = headgate(house, "maint", "app", FIRST, "--wait", "--timeout", "0.1")
    assert late.returncode == 1
    assert f"app: {FIRST} did not become empty within 0.1 s (2 in flight)" in late.stderr
    assert late.stdout.splitlines()[1:] == [f"app: {FIRST}: 2 in flight"]
    house.plane.busy.clear()
    empty = headgate(house, "maint", "app", FIRST, "--wait")
    assert (empty.returncode, empty.stdout.splitlines()[-1]) == (0, f"app: {FIRST} is empty")
    house.prober.down.add(FIRST)
    late = headgate(house, "enable", "app", FIRST, "--wait", "--timeout", "0.5")
    assert late.returncode == 1
    assert f"app: {FIRST} did not get requests within 0.5 s (its health is " in late.stderr
    assert f"app: {FIRST}: its health is down (refused)" in late.stdout.splitlines()
    house.prober.down.clear()
    house.do(lambda: house.prober.probe_now("app", FIRST))
    serves = headgate(house, "enable", "app", FIRST, "--wait")
    assert (serves.returncode, serves.stdout.splitlines()[-1]) == (0, f"app: {FIRST} serves")


def test_while_it_waits_each_number_in_flight_is_shown_once(house: House) -> None:
    house.plane.busy[FIRST] = 2
    house.until(lambda: house.runtime.counters.upstreams["app"][FIRST].in_flight == 2)
    for words, one in (
        (("offline", FIRST, "--wait", "20"), rf"app: {FIRST} gets no new request \(table \d+\); 1 still under way\n"),
        (("maint", "app", FIRST, "--wait"), rf"app: {FIRST}: 1 in flight\n"),
    ):
        house.plane.busy[FIRST] = 2
        waiting = subprocess.Popen(command(house.directory, *words), stdout=subprocess.PIPE, text=True)
        try:
            assert waiting.stdout is not None
            shown = [waiting.stdout.readline()]
            while not re.search(r"2 (still|in)", shown[-1]):
                shown.append(waiting.stdout.readline())
            house.plane.busy[FIRST] = 1
            shown.append(waiting.stdout.readline())
            assert re.fullmatch(one, shown[-1])
            house.plane.busy.clear()
            rest, _ = waiting.communicate(timeout=20)
        finally:
            waiting.kill()
            waiting.wait()
        assert waiting.returncode == 0
        assert len(rest.splitlines()) == 1, "how it ended"
        assert headgate(house, "online", FIRST).returncode == 0


@pytest.mark.parametrize(
    ("broken", "code", "why"), [("", 0, "by an operator"), ("it ended with 1", 1, "it ended with 1")]
)
def test_an_abort_shows_progress_and_fails_only_where_a_server_is_left_behind(
    house: House, broken: str, code: int, why: str
) -> None:
    house.do(house.processes.stuck.clear)
    assert headgate(house, "restart", "app", FIRST, "--no-wait").returncode == 0
    house.until(lambda: any(s.name == "exit" and s.state == "running" for s in house.runtime.state.changes[1].steps))
    waiting = subprocess.Popen(command(house.directory, "abort", "1"), stdout=subprocess.PIPE, text=True)
    try:
        assert waiting.stdout is not None
        while "exit …" not in waiting.stdout.readline():
            assert waiting.poll() is None
        house.processes.broken = broken
        house.do(house.processes.stuck.set)
        shown, _ = waiting.communicate(timeout=20)
    finally:
        waiting.kill()
        waiting.wait()
    last = shown.splitlines()[-1]
    assert waiting.returncode == code
    assert re.match(r"change 1: restart of app aborted after [\d.]+ m?s: ", last)
    assert why in last


def test_offline_and_online_say_what_nginx_does_and_offline_can_wait(house: House) -> None:
    house.plane.busy[FIRST] = 2
    done = headgate(house, "offline", FIRST)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"app: {FIRST} gets no new request \(table \d+\); 2 still under way\n", done.stdout)
    assert headgate(house, "offline", FIRST, "--wait", "0.1").returncode == 1
    house.plane.busy.clear()
    done = headgate(house, "offline", FIRST, "--upstream", "app", "--wait", "20")
    assert (done.returncode, done.stdout.split("; ")[1]) == (0, "none is under way\n")
    shown = headgate(house, "status").stdout
    assert "app: 2 of 3 servers serving" in shown
    assert re.search(rf"^{FIRST}: quarantined for 1[\d.]+ s more \(notice\): announced by hand$", shown, re.MULTILINE)
    done = headgate(house, "online", FIRST)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{FIRST} is announced and probed \(table \d+\)\n", done.stdout)
    house.until(house.settled)
    assert "quarantined" not in headgate(house, "status").stdout


def test_offline_of_the_last_server_is_refused_with_4(house: House) -> None:
    for key in (FIRST, SECOND):
        assert headgate(house, "offline", key).returncode == 0
    refused = headgate(house, "offline", THIRD)
    assert (refused.returncode, refused.stdout) == (4, "")
    assert f"{THIRD}: no other server of app serves" in refused.stderr


def test_warm_up_begins_anew_where_there_is_something_to_warm_up(house: House) -> None:
    off = headgate(house, "warm-up", "app", FIRST)
    assert (off.returncode, off.stdout) == (2, "")
    assert "app has no warm-up" in off.stderr
    warming = replace(POLICY, warm_up=WarmUpPolicy(duration=600, starts="healthy"))
    house.source.config = replace(house.source.config, upstreams=(replace(APP, policy=warming),))
    house.call(house.runtime.read_config())
    done = headgate(house, "warm-up", "app", FIRST)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"app: {FIRST} warms up \(table \d+\)\n", done.stdout)
    assert re.search(rf"^{FIRST} .* 10% \d+ min \d+ s left", headgate(house, "status").stdout, re.MULTILINE)


def test_a_guard_refuses_with_4_and_force_insists(house: House) -> None:
    for key in (FIRST, SECOND):
        assert headgate(house, "maint", "app", key).returncode == 0
    refused = headgate(house, "drain", "app", THIRD)
    assert (refused.returncode, refused.stdout) == (4, "")
    assert "no other server of app serves" in refused.stderr
    assert "--force" in refused.stderr
    assert headgate(house, "drain", "app", THIRD, "--force").returncode == 0


def test_a_rollout_prints_each_step_and_ends_in_a_table_of_them(house: House) -> None:
    done = headgate(house, "rollout", "app", "--batch", "50%")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "mind: app has no warm-up: a server that comes back gets its full share while it is cold"
    ]
    lines = done.stdout.splitlines()
    for key in (FIRST, SECOND, THIRD):
        assert any(
            re.match(rf"\d\d:\d\d:\d\d  {key}  start done in [\d.]+ m?s: master \d+ listens", line) for line in lines
        )
    assert sum(line.split()[:2] == ["SERVER", "STEP"] for line in lines) == 1
    assert re.fullmatch(r"change 1: rollout of app done in [\d.]+ m?s", lines[-1])


def test_a_failed_restart_exits_with_1_and_says_why(house: House) -> None:
    house.processes.broken = "gunicorn ended with 1: see [upstream.app.process]"
    done = headgate(house, "restart", "app", FIRST)
    assert done.returncode == 1
    assert "failed" in done.stdout
    shown = headgate(house, "changes", "1").stdout
    assert shown.count(house.processes.broken) == 2, "brackets are text, in the table as in the last line"
    assert house.processes.broken in shown.splitlines()[-1]


def test_without_waiting_a_change_says_how_to_follow_it(house: House) -> None:
    done = headgate(house, "restart", "app", FIRST, "--no-wait")
    assert (done.returncode, done.stderr) == (0, "")
    assert "headgate changes 1 --wait" in done.stdout
    assert headgate(house, "changes", "1", "--wait").returncode == 0
    assert headgate(house, "stop", "app", FIRST).returncode == 0
    assert headgate(house, "start", "app", FIRST).returncode == 0
    listed = headgate(house, "changes").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["ID", "3", "2", "1"]
    assert [change["id"] for change in json.loads(headgate(house, "changes", "--json").stdout)["changes"]] == [3, 2, 1]
    one = json.loads(headgate(house, "changes", "1", "--json").stdout)
    assert (one["kind"], one["status"]) == ("restart", "done")


def test_a_change_shows_what_it_goes_by_where_that_was_asked_for(house: House) -> None:
    words = ("app", "--workers", "4", "--batch", "2", "--max-unavailable", "1", "--force")
    assert headgate(house, "scale", *words).returncode == 0
    assert "batch 2, at most 1 away, to 4 workers" in headgate(house, "changes", "1").stdout.splitlines()
    assert headgate(house, "restart", "app", FIRST).returncode == 0
    shown = headgate(house, "changes", "2").stdout
    assert not any(word in shown for word in ("batch", "away", "to 0 workers"))


def test_ctrl_c_while_waiting_leaves_the_change_alone_and_says_so(house: House) -> None:
    house.do(house.processes.stuck.clear)
    waiting = subprocess.Popen(
        command(house.directory, "restart", "app", FIRST), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert waiting.stdout is not None
        while "exit …" not in waiting.stdout.readline():
            assert waiting.poll() is None
        waiting.send_signal(signal.SIGINT)
        _, errors = waiting.communicate(timeout=20)
    finally:
        waiting.kill()
        waiting.wait()
    assert waiting.returncode == 130
    assert "interrupted: change 1 goes on in the daemon; follow it with: headgate changes 1 --wait" in errors
    house.do(house.processes.stuck.set)
    assert headgate(house, "changes", "1", "--wait").returncode == 0


def test_following_survives_a_restart_of_the_daemon(tmp_path: Path) -> None:
    (tmp_path / "headgate.toml").write_text(f'[api]\nsocket = "{tmp_path}/run/api.sock"\nlisten = ""\n')
    with House(tmp_path) as house:
        house.do(house.processes.stuck.clear)
        waiting = subprocess.Popen(command(tmp_path, "restart", "app", FIRST), stdout=subprocess.PIPE, text=True)
        assert waiting.stdout is not None
        while "exit …" not in waiting.stdout.readline():
            assert waiting.poll() is None
    try:
        with House(tmp_path):
            output, _ = waiting.communicate(timeout=30)
    finally:
        waiting.kill()
        waiting.wait()
    assert waiting.returncode == 0
    assert re.fullmatch(r"change 1: restart of app done in [\d.]+ m?s", output.splitlines()[-1])


def test_events_are_lines_and_follow_goes_on(house: House) -> None:
    assert headgate(house, "maint", "app", FIRST).returncode == 0
    past = headgate(house, "events", "--limit", "1").stdout
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d  admin        app: {FIRST} is now maint\n", past)
    following = subprocess.Popen(
        command(house.directory, "events", "--follow", "--json"), stdout=subprocess.PIPE, text=True
    )
    try:
        assert following.stdout is not None
        while json.loads(following.stdout.readline())["text"] != f"app: {FIRST} is now maint":
            assert following.poll() is None
        assert headgate(house, "enable", "app", FIRST).returncode == 0
        assert json.loads(following.stdout.readline())["text"] == f"app: {FIRST} is now ready"
        following.send_signal(signal.SIGINT)
        assert following.wait(20) == 0
    finally:
        following.kill()
        following.wait()
        following.stdout.close()


class Terminal:
    """A command on a terminal of its own; what it shows is collected until it ends."""

    def __init__(self, *words: str) -> None:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40"}
        self.process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self._descriptor = ours
        self._changed = threading.Condition()
        self._shown = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._descriptor, 65536)
            except OSError:  # EIO: the last process on it has ended
                return
            with self._changed:
                self._shown += data.decode(errors="replace")
                self._changed.notify_all()

    def wait_for(self, text: str) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self._shown, 20), self._shown
            return self._shown

    def end(self, number: signal.Signals | None = None) -> tuple[int, str]:
        if number is not None:
            self.process.send_signal(number)
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join()
            os.close(self._descriptor)
        return self.process.returncode, self._shown


def test_on_a_terminal_progress_is_live_and_coloured_and_the_table_remains(house: House) -> None:
    house.do(house.processes.stuck.clear)
    house.plane.busy[SECOND] = 7
    terminal = Terminal(*command(house.directory, "restart", "app", FIRST))
    try:
        terminal.wait_for("█")
        terminal.wait_for("exit")
        house.do(house.processes.stuck.set)
    finally:
        code, shown = terminal.end()
    assert code == 0
    assert "\x1b[" in shown
    assert "IN FLIGHT" in shown
    assert "change 1: restart of app done in" in shown.splitlines()[-1]


def test_watching_on_a_terminal_follows_and_ends_with_ctrl_c(house: House) -> None:
    terminal = Terminal(*command(house.directory, "status", "--watch"))
    try:
        terminal.wait_for("app: 3 of 3 servers serving")
        assert headgate(house, "maint", "app", FIRST).returncode == 0
        terminal.wait_for("app: 2 of 3 servers serving")
    finally:
        code, _ = terminal.end(signal.SIGINT)
    assert code == 0


def test_exit_codes_tell_usage_settings_and_an_absent_daemon_apart(house: House, tmp_path: Path) -> None:
    for words in (
        ("explode",),
        ("drain", "app"),
        ("rollout", "app", "--batch", "0%"),
        ("drain", "nope", FIRST),
        ("drain", "app", "10.9.9.9:1"),
        ("offline", "10.9.9.9:1"),
        ("online", FIRST, "--upstream", "nope"),
        ("warm-up", "app", "10.9.9.9:1"),
        ("changes", "99"),
        ("restart", "named", "unix:/run/a b.sock", "--force"),
    ):
        done = headgate(house, *words)
        assert (words, done.returncode) == (words, 2)
        assert done.stderr
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "headgate.toml").write_text(f'[api]\nsocket = "{absent}/api.sock"\n')
    for words in (("status",), ("drain", "app", FIRST), ("events",)):
        done = subprocess.run(command(absent, *words), capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout) == (3, "")
        assert "no such socket" in done.stderr
        assert "headgate run" in done.stderr
    (absent / "headgate.toml").write_text("[api]\nsokcet = 1\n")
    done = subprocess.run(command(absent, "status"), capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "sokcet" in done.stderr


def test_the_settings_can_be_named_by_the_environment(house: House) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "controller", "status", "--json"],
        env={**os.environ, "HEADGATE_CONFIG": f"{house.directory}/headgate.toml"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0


def test_the_include_holds_the_paths_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "headgate.toml").write_text('[nginx]\ncontrol = "/run/o/n.sock"\nsnapshot = "/var/o/t.json"\n')
    done = subprocess.run(command(tmp_path, "include"), capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert "/run/o/n.sock" in done.stdout
    assert "/var/o/t.json" in done.stdout
    assert "/run/headgate/nginx.sock" not in done.stdout


def test_version_needs_no_daemon(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "controller", "version"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, f"headgate {version('headgate')}\n")


def test_docs_name_every_command_with_every_option() -> None:
    group = typer.main.get_command(app)
    sections = dict(
        re.findall(r"^### `headgate ([\w-]+)[^\n]*\n(.*?)(?=^##|\Z)", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    )
    headings = dict(re.findall(r"^### `headgate ([\w-]+)([^\n]*)", DOCS.read_text(), re.MULTILINE))
    commands = group.commands  # type: ignore[attr-defined]
    assert set(sections) == set(commands)
    for name, each in commands.items():
        options = {
            word for option in each.params for word in (*option.opts, *option.secondary_opts) if word[:2] == "--"
        }
        documented = set(re.findall(r"--[a-z-]+", headings[name] + sections[name]))
        assert (name, documented - {"--config"}) == (name, options - {"--help"})
