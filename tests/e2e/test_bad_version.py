"""A new version that its probes find well and its traffic finds broken stops at its first server, and is taken back."""

from __future__ import annotations

from typing import Any

import pytest

from controller.demo.stage import UPSTREAM, Stage, until

# A deploy is another line in gunicorn's own configuration; what a `broken` one does is below.
SETTINGS = """
deploy = ["sh", "-c", "cat broken.py >> gunicorn.conf.py"]
roll_back = ["sh", "-c", "cp sound.py gunicorn.conf.py"]
deploy_timeout = "10s"

[upstream.app.outlier]
base = "2s"
"""

BROKEN = """
_sound = globals().get("post_worker_init", lambda worker: None)


def post_worker_init(worker):
    _sound(worker)
    inner = worker.wsgi

    def broken(environ, start_response):
        if environ["PATH_INFO"] == "/healthz":
            return inner(environ, start_response)
        start_response("500 Internal Server Error", [("Content-Length", "0")])
        return []

    worker.wsgi = broken
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_deploy_of_a_version_that_answers_500_stops_at_the_first_server_and_is_rolled_back() -> None:
    with Stage("gthread", warm_up=60.0, settings=SETTINGS) as stage:
        (stage.prefix / "sound.py").write_text((stage.prefix / "gunicorn.conf.py").read_text())
        (stage.prefix / "broken.py").write_text(BROKEN)
        first, second, third = stage.addresses
        load = stage.load(100)
        log = stage.prefix / "headgate.log"
        change = stage.client.begin_change("deploy", UPSTREAM)
        until(lambda: stage.client.change(change)["status"] != "running", "the end of the deploy", 120, log)
        record = stage.client.change(change)
        load.finish()
        assert record["status"] == "failed"
        assert record["error"] == (
            f"{first}: warm: taken out of traffic again while warming: "
            "nginx ejected it after 5 answers with status 5xx in a row; rolled back"
        )
        assert begun(record, second) == begun(record, third) == []
        assert begun(record, first)[-2:] == ["start", "up"]
        said = [event["text"] for event in stage.client.events() if event["server"] == first]
        assert any(" holds at " in text and text.endswith("5xx in a row") for text in said)


def begun(record: dict[str, Any], server: str) -> list[str]:
    return [s["name"] for s in record["steps"] if s["server"] == server and s["started_at"]]
