"""What `headgate install` writes and takes out again, below a directory: for packagers, and without a systemd."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from controller import install
from controller.settings import DEFAULT_FILE, Settings, build

UNIT, TMPFILES = "etc/systemd/system/headgate.service", "etc/tmpfiles.d/headgate.conf"
TOML, DROPIN = "etc/headgate/headgate.toml", "etc/systemd/system/app@.service.d/headgate.conf"
SCRIPT = Path(sys.executable).with_name("headgate")
PYTHON_WORD, SCRIPT_WORD = (f'"{each}"' if " " in str(each) else each for each in (sys.executable, SCRIPT))


def headgate(*words: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HEADGATE_")}
    run = [sys.executable, "-m", "controller", *words]
    return subprocess.run(run, capture_output=True, text=True, timeout=60, input=answer, env=clean)


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def installed(root: Path, *words: str) -> str:
    done = headgate("install", "--root", str(root), *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_install_writes_unit_directory_and_settings_and_the_second_time_nothing(tmp_path: Path) -> None:
    shown = installed(tmp_path, "--yes")
    assert files(tmp_path) == {UNIT, TMPFILES, TOML}
    assert "\n".join(f"+{line}" for line in (tmp_path / UNIT).read_text().splitlines()) in shown
    assert f"ExecStart={SCRIPT_WORD} run" in (tmp_path / UNIT).read_text()
    assert "d /run/headgate 0750 root root -" in (tmp_path / TMPFILES).read_text().splitlines()
    assert all((tmp_path / each).stat().st_mode & 0o777 == 0o644 for each in files(tmp_path))
    before = {each: (tmp_path / each).stat().st_mtime_ns for each in files(tmp_path)}
    assert installed(tmp_path, "--yes") == ""
    assert {each: (tmp_path / each).stat().st_mtime_ns for each in files(tmp_path)} == before


def test_diff_shows_and_changes_nothing(tmp_path: Path) -> None:
    shown = installed(tmp_path, "--diff")
    assert "+++ " + str(tmp_path / UNIT) in shown
    assert shown.endswith(f"would change: {tmp_path / UNIT}, {tmp_path / TMPFILES}, {tmp_path / TOML}\n")
    assert files(tmp_path) == set()
    installed(tmp_path, "--yes")
    assert installed(tmp_path, "--diff") == "would change: nothing\n"
    (tmp_path / UNIT).write_text((tmp_path / UNIT).read_text().replace("WatchdogSec=30", "WatchdogSec=1"))
    shown = installed(tmp_path, "--diff")
    assert "-WatchdogSec=1\n+WatchdogSec=30\n" in shown
    assert shown.endswith(f"would change: {tmp_path / UNIT}\n")


def test_settings_that_are_there_stay_and_decide_what_the_unit_may_write(tmp_path: Path) -> None:
    (tmp_path / TOML).parent.mkdir(parents=True)
    (tmp_path / TOML).write_text("# mine\n")
    installed(tmp_path, "--yes")
    assert (tmp_path / TOML).read_text() == "# mine\n"
    raw = {
        "nginx": {"conf": "/srv/my edge/conf/nginx.conf", "control": "/run/edge/nginx.sock", "include": "/srv/100%/h"},
        "store": {"url": "sqlite:////srv/state/headgate.db"},
    }
    unit, tmpfiles, *_ = install.service(build(raw, {}, "test"), DEFAULT_FILE, tmp_path)
    assert unit.after
    assert tmpfiles.after
    (line,) = (line for line in unit.after.decode().splitlines() if line.startswith("ReadWritePaths="))
    writable = shlex.split(line.removeprefix("ReadWritePaths="))
    assert {"-/srv/my edge/conf", "-/srv/100%%", "-/srv/state", "-/run", "-/etc/nginx"} <= set(writable)
    assert "-/run/edge" not in writable, "it lies in /run"
    lines = tmpfiles.after.decode().splitlines()
    assert lines[1:] == ["d /run/edge 0750 root root -", "d /run/headgate 0750 root root -"]


def test_settings_elsewhere_are_named_in_every_command(tmp_path: Path) -> None:
    unit, _, toml = install.service(Settings(), "/etc/edge $1/headgate.toml", tmp_path)
    assert unit.after
    assert f'ExecStart={SCRIPT_WORD} --config "/etc/edge $$1/headgate.toml" run' in unit.after.decode()
    assert toml.path == tmp_path / "etc/edge $1/headgate.toml"
    dropin = install.application("app@.service", "/etc/edge/headgate.toml", tmp_path)
    assert dropin.after
    assert f"{SCRIPT_WORD} --config /etc/edge/headgate.toml drain --self --wait" in dropin.after.decode()


def test_an_application_gets_a_drop_in_of_its_own_and_gives_it_back(tmp_path: Path) -> None:
    installed(tmp_path, "--yes", "--app", "app@", "--app", "shop.service")
    assert files(tmp_path) == {DROPIN, "etc/systemd/system/shop.service.d/headgate.conf"}
    lines = (tmp_path / DROPIN).read_text().splitlines()
    assert f"ExecStop=-+{PYTHON_WORD} -I {SCRIPT_WORD} drain --self --wait" in lines
    assert f"ExecStartPost=-+{PYTHON_WORD} -I {SCRIPT_WORD} enable --self" in lines
    installed(tmp_path, "--yes", "--uninstall", "--app", "app@")
    assert files(tmp_path) == {"etc/systemd/system/shop.service.d/headgate.conf"}
    assert not (tmp_path / DROPIN).parent.exists()


def test_uninstall_takes_out_what_is_ours_and_with_purge_the_settings(tmp_path: Path) -> None:
    installed(tmp_path, "--yes")
    installed(tmp_path, "--yes", "--app", "app@")
    theirs = tmp_path / "etc/systemd/system/other.service.d/headgate.conf"
    theirs.parent.mkdir()
    theirs.write_text("[Service]\nNice=1\n")
    (tmp_path / "etc/headgate/token").write_text("secret")
    shown = installed(tmp_path, "--uninstall", "--diff")
    assert shown.endswith(f"would change: {tmp_path / DROPIN}, {tmp_path / UNIT}, {tmp_path / TMPFILES}\n")
    installed(tmp_path, "--uninstall", "--yes")
    assert files(tmp_path) == {TOML, "etc/headgate/token", str(theirs.relative_to(tmp_path))}
    installed(tmp_path, "--uninstall", "--purge", "--yes")
    assert files(tmp_path) == {"etc/headgate/token", str(theirs.relative_to(tmp_path))}
    theirs.unlink()
    (tmp_path / "etc/headgate/token").unlink()
    assert installed(tmp_path, "--uninstall", "--purge", "--yes") == ""


def test_it_asks_before_it_writes(tmp_path: Path) -> None:
    asked = headgate("install", "--root", str(tmp_path), answer="n\n")
    assert asked.returncode == 1
    assert "Write this? [y/N]" in asked.stdout
    assert "nothing was changed" in asked.stderr
    assert files(tmp_path) == set()
    assert headgate("install", "--root", str(tmp_path), answer="y\n").returncode == 0
    assert UNIT in files(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--app", "../../passwd"), "no name of a service"),
        (("--app", "app@.socket "), "no name of a service"),
        (("--purge",), "--purge goes with --uninstall alone"),
        (("--purge", "--uninstall", "--app", "app@"), "--purge goes with --uninstall alone"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = headgate("install", "--root", str(tmp_path), *words)
    assert (done.returncode, files(tmp_path)) == (2, set())
    assert said in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.skipif(Path("/run/systemd/system").exists(), reason="systemd runs here")
def test_without_systemd_it_says_so() -> None:
    done = headgate("install", "--yes")
    assert done.returncode == 1
    assert "was not booted with systemd" in done.stderr
    assert "headgate run" in done.stderr


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("a file where a directory must be")
    done = headgate("install", "--root", str(tmp_path), "--yes")
    assert done.returncode == 1
    assert str(tmp_path / "etc") in done.stderr.replace("\n", "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_finds_no_fault_in_the_unit_and_calls_it_little_exposed(tmp_path: Path) -> None:
    installed(tmp_path, "--yes")
    analyze = ["systemd-analyze", "--no-pager", "--offline=true", "--threshold=30", "security", str(tmp_path / UNIT)]
    done = subprocess.run(analyze, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    verify = ["systemd-analyze", "--man=no", "verify", str(tmp_path / UNIT)]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60)
    assert "headgate.service" not in done.stderr
