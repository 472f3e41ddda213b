"""For every test: logs do not run into pytest's own lines, and the programs under test can be interrupted."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import structlog

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs so, and programs inherit it: Ctrl-C would not reach what a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere:
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(nowhere))
        yield
