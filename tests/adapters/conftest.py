"""Fixtures for the tests of probes and processes."""

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.adapters.probed import Probing, Raw, Web, make_certificate
from tests.support.gunicorn import Gunicorns


@pytest.fixture
async def probing() -> AsyncIterator[Probing]:
    probing = Probing()
    yield probing
    await probing.prober.close()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Web]:
    there = Web(tmp_path)
    await there.runner.setup()
    yield there
    await there.runner.cleanup()


@pytest.fixture
async def raw() -> AsyncIterator[Raw]:
    servers = Raw()
    yield servers
    await servers.close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for app.example, with its key in the same file."""
    return make_certificate(tmp_path_factory.mktemp("tls") / "app.pem", "app.example")


@pytest.fixture
def gunicorns(tmp_path: Path) -> Iterator[Gunicorns]:
    gunicorns = Gunicorns(tmp_path)
    yield gunicorns
    gunicorns.close()
    assert not gunicorns.alive()


# The other tests run 27. 20.1 still asks setuptools for pkg_resources, and the last uvicorn-worker for it
# needs an older uvicorn.
OLDER = ("20.1.0", "21.2.0", "22.0.0", "23.0.0", "24.1.1", "25.3.0", "26.2.0")


@pytest.fixture(scope="session", params=OLDER)
def older_python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python of its own for this version of gunicorn."""
    home = tmp_path_factory.mktemp(f"gunicorn-{request.param}")
    python = str(home / "bin" / "python")
    uvicorn = ["uvicorn==0.54.0", "uvicorn-worker==0.4.0"]
    if request.param == "20.1.0":
        uvicorn = ["uvicorn==0.35.0", "uvicorn-worker==0.3.0", "setuptools<81"]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    subprocess.run([*pip, f"gunicorn=={request.param}", *uvicorn], check=True)
    return python
