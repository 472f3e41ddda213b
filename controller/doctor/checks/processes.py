"""Traps of the server processes: gunicorn's and uvicorn's settings, their systemd units, how Headgate drives them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from controller.adapters.systemd import seconds
from controller.core.policy import ProcessPolicy
from controller.doctor.model import App, Facts, Found, Severity, check


@check("process-unfit", Severity.SEVERE)
def process_unfit(facts: Facts) -> Iterator[Found]:
    """Headgate is to drive a server's process and cannot: it is not the one that the settings speak of."""
    for upstream, server, message, remedy in facts.unfit:
        yield Found(f"{upstream}: {server.address}", facts.setting(f"upstream.{upstream}.process"), message, remedy)


@check("no-start", Severity.SEVERE)
def no_start(facts: Facts) -> Iterator[Found]:
    """Headgate can stop a server's process and has no way to start it again: a restart ends after the stop."""
    for name, tables in facts.settings.upstream.items():
        process = tables.process
        if process and not process.unit and not process.start:
            yield Found(
                name,
                facts.setting(f"upstream.{name}.process"),
                "neither unit nor start is set: a restart stops the server and cannot start it",
                "set unit to its systemd unit, or start to its command",
            )


@check("graceful-disagrees", Severity.SEVERE)
def graceful_disagrees(facts: Facts) -> Iterator[Found]:
    """Headgate kills a process (graceful_timeout + margin) before gunicorn's own graceful_timeout is over."""
    for app in facts.apps:
        own = app.number("graceful_timeout")
        for upstream, process in _driven(facts, app):
            if own is not None and process.graceful_timeout + process.margin <= own:
                yield Found(
                    app.subject,
                    f"{app.where}, {facts.setting(f'upstream.{upstream}.process.graceful_timeout')}",
                    f"gunicorn lets requests end for {own:g} s, Headgate kills it after {process.graceful_timeout:g} + "
                    f"{process.margin:g} s",
                    f'write graceful_timeout = "{own:g}s" in [upstream.{upstream}.process]',
                )


@check("gunicorn-timeout", Severity.WARNING)
def gunicorn_timeout(facts: Facts) -> Iterator[Found]:
    """gunicorn's `timeout` is not above `graceful_timeout`: a worker that drains is killed as one that hangs."""
    for app in facts.apps:
        timeout, graceful = app.number("timeout"), app.number("graceful_timeout")
        if timeout and graceful is not None and timeout <= graceful:
            yield Found(
                app.subject,
                app.where,
                f"timeout is {timeout:g} s, graceful_timeout {graceful:g} s; the heartbeat may stop while a worker "
                "drains",
                f"gunicorn --timeout {graceful + 15:g}: timeout above graceful_timeout above the longest request",
            )


@check("uvicorn-graceful", Severity.WARNING)
def uvicorn_graceful(facts: Facts) -> Iterator[Found]:
    """uvicorn workers do not know gunicorn's graceful_timeout: they wait without end, and are killed with requests."""
    for app in facts.apps:
        graceful = app.number("graceful_timeout")
        if not app.uvicorn or "worker_class" not in app.known or graceful is None:
            continue
        if app.own_graceful is None:
            told = "workers have no timeout_graceful_shutdown of their own"
        elif graceful <= app.own_graceful < float("inf"):
            told = f"workers' timeout_graceful_shutdown is {app.own_graceful:g} s"
        else:
            continue
        yield Found(
            app.subject,
            app.where,
            f"the uvicorn {told}; gunicorn kills them, and every request that they have, after {graceful:g} s",
            "gunicorn --worker-class controller.integration.worker.UvicornWorker; or a subclass of "
            "uvicorn_worker.UvicornWorker with CONFIG_KWARGS = {**UvicornWorker.CONFIG_KWARGS, "
            f'"timeout_graceful_shutdown": {max(1, int(graceful) - 5)}}}',
        )


@check("uvicorn-deprecated", Severity.HINT)
def uvicorn_deprecated(facts: Facts) -> Iterator[Found]:
    """`uvicorn.workers` is deprecated and will be taken out of uvicorn."""
    for app in facts.apps:
        if str(app.known.get("worker_class", "")).startswith("uvicorn.workers."):
            yield Found(
                app.subject,
                app.where,
                f"worker class {app.known['worker_class']} is deprecated",
                "install uvicorn-worker and write --worker-class uvicorn_worker.UvicornWorker",
            )


@check("daemon-mode", Severity.WARNING)
def daemon_mode(facts: Facts) -> Iterator[Found]:
    """gunicorn runs with --daemon: nobody restarts it when it dies, and a WINCH takes all its workers away."""
    for app in facts.apps:
        if app.known.get("daemon") is True:
            yield Found(
                app.subject,
                app.where,
                "it runs as a daemon: nobody restarts it, and a WINCH ends all workers while the socket goes on "
                "taking connections",
                "run it without --daemon, as a systemd unit with Type=notify",
            )


@check("preload-reload", Severity.WARNING)
def preload_reload(facts: Facts) -> Iterator[Found]:
    """preload_app: HUP starts new workers with the old code."""
    for app in facts.apps:
        if app.known.get("preload_app") is True:
            reload = facts.units.get(app.unit, {}).get("ExecReload", "")
            by_unit = re.search(r"HUP|-1\b", reload)
            yield Found(
                app.subject,
                f"{app.where}, ExecReload of {app.unit}" if by_unit else app.where,
                "it preloads the application: HUP" + (" (its unit's reload)" if by_unit else "") + " loads no new code",
                f"deploy with `headgate rollout {app.serves[0][0]}`, which starts new masters",
                None if by_unit else Severity.HINT,
            )


@check("backlog", Severity.WARNING)
def backlog(facts: Facts) -> Iterator[Found]:
    """A unix socket's queue is short: nginx answers 502 at once when it is full, where TCP would try again."""
    for app in facts.apps:
        wanted = app.number("backlog")
        unix = [server.address for _, server in app.serves if server.ip.startswith("unix:")]
        if not unix or wanted is None or facts.somaxconn is None or min(wanted, facts.somaxconn) >= 512:
            continue
        short = "net.core.somaxconn" if facts.somaxconn < wanted else "gunicorn's backlog"
        yield Found(
            app.subject,
            app.where,
            f"at most {min(wanted, facts.somaxconn):g} connections wait on {unix[0]} ({short}); the next one is a 502",
            "raise net.core.somaxconn and gunicorn --backlog to 2048",
        )


@check("unit-unknown", Severity.SEVERE)
def unit_unknown(facts: Facts) -> Iterator[Found]:
    """A process runs in a unit that always restarts it, and Headgate is not told: its TERM is fought by systemd."""
    for app in facts.apps:
        restart = facts.units.get(app.unit, {}).get("Restart", "no")
        for upstream, process in _driven(facts, app):
            if app.unit and not process.unit and restart != "no":
                always = restart == "always"
                yield Found(
                    app.subject,
                    f"{app.where}, {facts.setting(f'upstream.{upstream}.process')}",
                    f"it runs in {app.unit} with Restart={restart}: after Headgate's TERM systemd "
                    + ("starts it at once" if always else "does not start it again, nor know why"),
                    f'write unit = "{app.unit}" (with {{port}} where they differ) in [upstream.{upstream}.process]',
                    None if always else Severity.WARNING,
                )


@check("stop-timeout", Severity.SEVERE)
def stop_timeout(facts: Facts) -> Iterator[Found]:
    """systemd's TimeoutStopSec is not above the graceful timeout: it kills what is still answering."""
    for app in facts.apps:
        timeout = seconds(facts.units.get(app.unit, {}).get("TimeoutStopUSec", ""))
        graceful = app.number("graceful_timeout")
        if timeout is not None and graceful is not None and timeout <= graceful:
            yield Found(
                app.subject,
                f"{app.where}, TimeoutStopSec of {app.unit}",
                f"systemd kills it {timeout:g} s after the stop, gunicorn lets requests end for {graceful:g} s",
                f"write TimeoutStopSec={graceful + 10:g} in the unit",
            )


@check("kill-mode", Severity.WARNING)
def kill_mode(facts: Facts) -> Iterator[Found]:
    """A unit's KillMode is not `mixed`: workers get the stop signal beside their master, or outlive it."""
    for app in facts.apps:
        mode = facts.units.get(app.unit, {}).get("KillMode", "mixed")
        if mode != "mixed":
            orphans = mode in ("process", "none")
            yield Found(
                app.subject,
                f"{app.where}, KillMode of {app.unit}",
                f"KillMode={mode}: "
                + ("workers can outlive their master" if orphans else "systemd signals the workers, too"),
                "write KillMode=mixed in the unit",
            )


@check("kill-signal", Severity.SEVERE)
def kill_signal(facts: Facts) -> Iterator[Found]:
    """A unit stops gunicorn with INT or QUIT, which is its quick way out: requests are cut off."""
    for app in facts.apps:
        number = facts.units.get(app.unit, {}).get("KillSignal", "15")
        if number in ("2", "3") and "graceful_timeout" in app.known:
            yield Found(
                app.subject,
                f"{app.where}, KillSignal of {app.unit}",
                f"it is stopped with {'SIGINT' if number == '2' else 'SIGQUIT'}, at which gunicorn does not wait for "
                "requests",
                "take KillSignal out of the unit; TERM is the default",
            )


def _driven(facts: Facts, app: App) -> Iterator[tuple[str, ProcessPolicy]]:
    """The upstreams through which Headgate drives this process, each once."""
    for upstream in dict(app.serves):
        if process := facts.process(upstream):
            yield upstream, process
