"""What a plain nginx makes of a server that refuses: for which requests it asks another one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.support.gunicorn import GTHREAD, Gunicorns, free_port, wait_for
from tests.support.nginx import Nginx

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
UVICORN = "controller.integration.worker.UvicornWorker"
APPS = """
from controller.integration.asgi import Offline as Asgi
from controller.integration.wsgi import Offline as Wsgi
from tests.support import apps

def answer(environ, start_response):
    environ["wsgi.input"].read()
    return apps.wsgi(environ, start_response)

asgi, wsgi = Asgi(apps.asgi, {options}), Wsgi(answer, {options})
"""
HTTP = """
    upstream app {{ server 127.0.0.1:{ports[0]} max_fails=0; server 127.0.0.1:{ports[1]} max_fails=0; keepalive 4; }}
    add_header X-Tried $upstream_status always;
    server {{
        listen 127.0.0.1:{front};
        location / {{
            proxy_pass http://app;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_next_upstream error timeout http_503 {more};
        }}
    }}
"""
Ask = Callable[[str], tuple[int, str, str | None]]


@pytest.fixture
def gunicorns(tmp_path: Path) -> Iterator[Gunicorns]:
    gunicorns = Gunicorns(tmp_path, "leaving")
    yield gunicorns
    gunicorns.close()


def tried(gunicorns: Gunicorns, worker: str, options: str, more: str, *methods: str) -> dict[str, tuple[int, set[str]]]:
    """By method: the worst status that a client got, and the statuses of the servers that nginx asked in turn."""
    (gunicorns.directory / "leaving.py").write_text(APPS.format(options=options))
    conf = gunicorns.directory / "conf.py"
    conf.write_text(
        "from controller.integration.gunicorn import configure\n"
        f"configure(globals(), headgate='{gunicorns.directory}/nobody.sock', grace=60)\n"
    )
    ports = [free_port(), free_port()]
    masters = [gunicorns.master(f"127.0.0.1:{port}", "--config", str(conf), worker=worker, workers=1) for port in ports]
    wait_for(lambda: gunicorns.printed().count("could not be announced") == 2, "both servers", gunicorns.printed)
    front = free_port()
    with Nginx(HTTP.format(ports=ports, front=front, more=more), plane=False):
        masters[0].terminate()
        wait_for(lambda: "without Headgate" in gunicorns.printed(), "the flag", gunicorns.printed)
        found = {}
        for method in methods:
            statuses, ways = [], set()
            for _ in range(6):
                connection = HTTPConnection("127.0.0.1", front, timeout=10)
                connection.request(method, "/", body=b"x" * 100_000 if method in ("POST", "PUT") else None)
                response = connection.getresponse()
                response.read()
                statuses.append(response.status)
                ways.add(response.headers["X-Tried"])
                connection.close()
            found[method] = (max(statuses), ways)
    return found


@pytest.mark.parametrize("worker", [GTHREAD, UVICORN])
def test_nginx_asks_another_server_for_what_is_refused_and_a_post_is_answered(
    gunicorns: Gunicorns, worker: str
) -> None:
    found = tried(gunicorns, worker, "", "", "GET", "PUT", "POST")
    assert found == {
        "GET": (200, {"200", "503, 200"}),
        "PUT": (200, {"200", "503, 200"}),
        "POST": (200, {"200"}),
    }


def test_with_non_idempotent_on_both_sides_a_post_goes_to_another_server_as_well(gunicorns: Gunicorns) -> None:
    found = tried(gunicorns, UVICORN, "non_idempotent=True", "non_idempotent", "POST")
    assert found == {"POST": (200, {"200", "503, 200"})}


def test_with_non_idempotent_on_the_application_s_side_alone_a_post_fails(gunicorns: Gunicorns) -> None:
    found = tried(gunicorns, UVICORN, "non_idempotent=True", "", "POST")
    assert found == {"POST": (503, {"200", "503"})}
