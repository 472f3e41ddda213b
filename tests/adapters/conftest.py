"""Fixtures for the tests of probes and processes."""

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
