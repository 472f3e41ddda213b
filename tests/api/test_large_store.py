"""What people ask does not take longer because a lot has happened."""

from __future__ import annotations

import pytest

from tests.bench import store_size


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_answers_about_a_million_events_come_as_fast_as_about_one_page_of_them() -> None:
    slower = {name: times.large / times.small for name, times in store_size.measure().items()}
    assert set(slower) == {"status", "changes", "events", "explain"}
    # One that read all events would be slower fiftyfold.
    assert {name: ratio for name, ratio in slower.items() if ratio > 10} == {}
