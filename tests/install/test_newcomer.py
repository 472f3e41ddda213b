"""A newcomer types `make run` in a clean clone on a fresh Debian 12.

The tests stand in the order in which somebody meets these, and share one container.
"""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.container import ROOT, Fresh, missing, wheelhouse

CLONES = {"root": "/root/a clone", "newcomer": "/home/newcomer/a clone"}
WHEELS = "/opt/wheels"
#: What `make run` needs of PyPI comes from here: a machine may reach it only with settings of its own.
PIP = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": WHEELS}


def checkout(target: Path) -> Path:
    """The files of the repository, and no other, as a tar archive."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(target, "w") as archive:
        for name in filter(None, listed.decode().split("\0")):
            archive.add(ROOT / name, name)
    return target


def make_run(fresh: Fresh, user: str) -> tuple[int, str]:
    return fresh.as_user(user, CLONES[user], "make", "run", ONCE="1", HOME=f"{CLONES[user]}/..", **PIP)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    if reason := missing():
        if os.environ.get("HEADGATE_CONTAINERS") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    here = tmp_path_factory.mktemp("fresh")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    host = Fresh()
    try:
        for wheel in wheelhouse(here, *build, "editables").iterdir():
            host.copy(wheel, f"{WHEELS}/{wheel.name}")
        host.copy(checkout(here / "clone.tar"), "/opt/clone.tar")
        for user, clone in CLONES.items():
            host.run("mkdir", clone)
            host.run("tar", "-C", clone, "--no-same-owner", "-xf", "/opt/clone.tar")
            host.run("chown", "-R", f"{user}:", clone)
        yield host
    finally:
        host.close()


@pytest.mark.container
@pytest.mark.timeout(900)
class TestANewcomer:
    def test_without_the_packages_an_ordinary_user_is_told_the_line_to_type(self, fresh: Fresh) -> None:
        code, said = make_run(fresh, "newcomer")
        assert code != 0
        assert "Error 1" in said
        assert "sudo apt-get install --no-install-recommends nginx libnginx-mod-http-lua" in said
        assert fresh.as_user("newcomer", CLONES["newcomer"], "test", "-e", ".venv")[0] == 1, "nothing was begun"

    @pytest.mark.parametrize("user", CLONES)
    def test_the_demo_loses_nothing_and_leaves_nothing(self, fresh: Fresh, user: str) -> None:
        before = fresh.run("ls", "/tmp")
        code, said = make_run(fresh, user)
        assert code == 0, said
        assert re.search(r"^ *0 failed requests of [1-9]", said, re.MULTILINE), said
        assert fresh.run("ls", "/tmp") == before
        # Not their names: nobody reaps orphans in a container whose first process is not made for it.
        left = fresh.run("sh", "-c", "cat /proc/[0-9]*/cmdline")
        assert not [name for name in ("nginx", "gunicorn", "python") if name in left], left
