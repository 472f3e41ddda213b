"""The one error shape, for everything that can go wrong, and what TCP may do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests

from controller.client import Client
from controller.errors import ApiError
from tests.support.house import House

TOKEN = "a-long-random-word"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("house"), listen="127.0.0.1:0", token=TOKEN) as started:
        yield started


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("reading"), listen="127.0.0.1:0") as started:
        yield started


def ask(house: House, method: str, path: str, token: str | None = TOKEN, **options: object) -> requests.Response:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    return requests.request(method, f"http://{house.api.address}{path}", headers=headers, timeout=5, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        ("GET", "/nowhere", {}, 404, "not_found"),
        ("GET", "/v1/upstreams/nope", {}, 404, "not_found"),
        ("GET", "/v1/status/", {}, 404, "not_found"),
        ("DELETE", "/v1/status", {}, 405, "method_not_allowed"),
        ("PUT", "/v1/upstreams/app/servers/127.0.0.1:8001", {}, 405, "method_not_allowed"),
        ("GET", "/v1/changes/zero", {}, 422, "invalid"),
        ("GET", "/v1/changes?limit=0", {}, 422, "invalid"),
        ("GET", "/v1/changes/1?wait=nan", {}, 422, "invalid"),
        ("GET", f"/v1/events?after={2**63}", {}, 422, "invalid"),
        ("POST", "/v1/changes", {"data": b"{"}, 422, "invalid"),
        ("POST", "/v1/changes", {"data": b"\xff"}, 400, "bad_request"),
        ("POST", "/v1/changes", {"json": {"kind": "explode", "upstream": "app"}}, 422, "invalid"),
        ("POST", "/v1/changes", {"json": {"kind": "drain", "upstream": "app", "batch": "0%"}}, 422, "invalid"),
        ("POST", "/v1/changes", {"json": {"kind": "drain", "upstream": "app", "batch": 0}}, 422, "invalid"),
        ("POST", "/v1/changes", {"json": {"kind": "drain", "upstream": "app", "\ud800": 1}}, 422, "invalid"),
        ("POST", "/v1/changes", {"json": {"kind": "drain", "upstream": "nope"}}, 404, "not_found"),
    ],
)
def test_every_error_has_code_message_and_remedy(
    house: House, method: str, path: str, options: dict[str, object], status: int, code: str
) -> None:
    answer = ask(house, method, path, **options)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert list(answer.json()) == ["error"]
    assert sorted(error) == ["code", "message", "remedy"]
    assert error["code"] == code
    assert error["message"]
    assert error["remedy"]


def test_a_405_says_what_is_allowed(house: House) -> None:
    assert ask(house, "DELETE", "/v1/status").headers["Allow"] == "GET"


def test_a_defect_is_a_500_of_the_same_shape(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("it broke")

    monkeypatch.setattr(house.runtime, "alive", broken)
    answer = ask(house, "GET", "/healthz")
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "code": "internal",
        "message": "RuntimeError: it broke",
        "remedy": "please report this; the daemon's log says more",
    }


def test_a_dead_runtime_is_not_alive(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house.runtime, "alive", lambda: False)
    answer = ask(house, "GET", "/healthz")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_alive")


@pytest.mark.parametrize("token", [None, "wrong", TOKEN + "x", TOKEN[:-1], "ä"])
def test_with_a_token_nothing_but_health_answers_without_it(house: House, token: str | None) -> None:
    headers = {"Authorization": f"Bearer {token}".encode()} if token else {}
    for path in ("/v1/status", "/metrics", "/openapi.json", "/nowhere"):
        answer = requests.get(f"http://{house.api.address}{path}", headers=headers, timeout=5)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert ask(house, "GET", "/healthz", token=None).status_code == 200
    assert ask(house, "GET", "/readyz", token=None).status_code == 200


def test_with_the_token_tcp_may_do_everything(house: House) -> None:
    client = Client(f"http://{house.api.address}", TOKEN)
    assert client.set_admin("app", "127.0.0.1:8001", "ready")["revision"] >= 1


def test_without_a_configured_token_tcp_is_for_reading(reading: House) -> None:
    client = Client(f"http://{reading.api.address}")
    assert client.status()["revision"] >= 1
    with pytest.raises(ApiError) as caught:
        client.set_admin("app", "127.0.0.1:8001", "drain")
    assert (caught.value.status, caught.value.code) == (403, "read_only")
    assert Client(str(reading.socket)).servers("app", "127.0.0.1:8001")[0]["admin"] == "ready"
