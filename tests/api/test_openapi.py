"""The API keeps to its own description, whatever is sent to it; and docs/api.md names every route and every metric."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from tests.support.house import House

TOKEN = "a-long-random-word"
DOCS = Path(__file__).parents[2] / "docs" / "api.md"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("house"), listen="127.0.0.1:0", token=TOKEN) as started:
        yield started


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_as_described(house: House, mode: GenerationMode) -> None:
    credentials = {"Authorization": f"Bearer {TOKEN}"}
    address = f"http://{house.api.address}/openapi.json"
    schema = schemathesis.openapi.from_url(address, headers=credentials)
    operations = [found.ok() for found in schema.get_all_operations()]
    for operation in operations:

        @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode))
        def keeps_to_it(case: schemathesis.Case) -> None:
            if mode is GenerationMode.POSITIVE:
                case.query.pop("wait", None)  # an example that waits a minute for news shows nothing
            # /readiness says no with 500, and other examples have taken the edge offline.
            says_no = case.path.startswith(("/readiness/", "/healthz/traffic"))
            meant = [schemathesis.checks.not_a_server_error] if says_no else []
            case.call_and_validate(headers=credentials, timeout=10, excluded_checks=meant)

        if mode is GenerationMode.POSITIVE or operation.body or operation.query:  # any text is a path
            keeps_to_it()
    assert len(operations) == len(routes(house)) - 1


def routes(house: House) -> set[str]:
    paths = requests.get(
        f"http://{house.api.address}/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=5
    ).json()["paths"]
    return {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods} | {"GET /openapi.json"}


def test_docs_name_exactly_the_routes_that_there_are(house: House) -> None:
    documented = re.findall(r"`((?:GET|PUT|POST|DELETE|PATCH) /[^`?]*)", DOCS.read_text())
    assert set(documented) == routes(house)


def test_docs_name_exactly_the_metrics_that_there_are(house: House) -> None:
    answer = requests.get(
        f"http://{house.api.address}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=5
    )
    scraped = set(re.findall(r"^(headgate_\w+)", answer.text, re.MULTILINE))
    assert set(re.findall(r"\bheadgate_\w+", DOCS.read_text())) == scraped
