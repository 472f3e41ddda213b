"""Where nginx or its Lua module is not installed, the tests that need it are skipped with that reason."""

from __future__ import annotations

import pytest

from tests.support.nginx import missing_parts


@pytest.fixture(scope="session")
def lua_nginx() -> None:
    reason = missing_parts()
    if reason is not None:
        pytest.skip(reason)
