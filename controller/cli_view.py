"""What the command shows: answers of the API to tables and sentences. No calls and no decisions belong here."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import IO, Any

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

Json = dict[str, Any]

_LEFT: JustifyMethod = "left"
_WIDE = 1000  # columns where nobody looks: a pipe gets whole lines
_COLOURS = {
    "ready": "green",
    "drain": "yellow",
    "maint": "magenta",
    "up": "green",
    "down": "red",
    "unknown": "yellow",
    "running": "cyan",
    "done": "green",
    "failed": "red",
    "queued": "yellow",
    "paused": "yellow",
    "aborting": "yellow",
    "rolling-back": "yellow",
    "aborted": "red",
    "superseded": "yellow",
    "skipped": "dim",
    "pending": "dim",
}
_CELLS = " ▁▂▃▄▅▆▇█"
_EJECTED = {
    "errors": "failures in a row",
    "timeouts": "timeouts in a row",
    "server_errors": "5xx answers in a row",
    "mark": "it marked itself offline",
}


def console(file: IO[str] | None = None) -> Console:
    """A console for this file (default standard output): colours and the window's width only on a terminal."""
    file = file or sys.stdout
    return Console(file=file, highlight=False, markup=False, soft_wrap=True, width=None if file.isatty() else _WIDE)


def status(answer: Json) -> RenderableType:
    """The whole state: one line about the daemon, then each upstream."""
    config = answer["config"]
    head = Text.assemble(("headgate", "bold"), f"  table {answer['revision']}, data plane {answer['data_plane']}, ")
    if config["state"] == "ok":
        head.append("nginx.conf read")
    elif config["state"] == "unread":
        head.append("nginx.conf is being read", "yellow")
    else:
        head.append(f"nginx.conf cannot be read, the last good reading is in force: {config['error']}", "red")
    if answer["offline"]:
        head.append("\nthis edge is offline: checks are answered no until `headgate edge enable`", "yellow")
    if not answer["upstreams"] and config["state"] != "ok":
        return head
    if not answer["upstreams"]:
        return Group(head, Text("no upstream has Headgate's hook; `headgate include` shows what nginx needs", "yellow"))
    return Group(head, *(part for each in answer["upstreams"] for part in (Text(), *_upstream(each))))


def serving(upstream: Json) -> str:
    """An upstream's state as a sentence."""
    servers = upstream["servers"]
    count = sum(server["effective_weight"] > 0 for server in servers)
    if upstream["fail_open"]:
        tried = f"{count} of {len(servers)}"
        if any(server["health"] == "up" for server in servers):
            return f"{upstream['name']}: too few servers are up, so health is ignored and {tried} serve (panic)"
        return f"{upstream['name']}: no server is up, so the {tried} that are down are tried (fail open)"
    return f"{upstream['name']}: {count} of {len(servers)} servers serving"


def changes(answer: Iterable[Json]) -> Table:
    """Changes, one a row."""
    table = _table(("ID", "right"), "BEGAN", "KIND", "UPSTREAM", "STATUS", ("TOOK", "right"), "ERROR")
    for change in answer:
        status = Text(change["status"], _COLOURS[change["status"]])
        kind = change["kind"] + (" (forced)" if change["forced"] else "")
        row = (str(change["id"]), date(change["created_at"]), kind, change["upstream"], status, _took(change))
        table.add_row(*row, change["error"])
    return table


def steps(change: Json) -> RenderableType:
    """What a change did, step by step, how it ended, and within what bounds it went."""
    table = _table("SERVER", "STEP", "STATE", "BEGAN", ("TOOK", "right"), "DETAIL")
    shown = (step for step in _by_server(change) if step["state"] != "skipped")
    for server, rows in groupby(shown, lambda step: step["server"]):
        name = server
        for step in rows:
            state = Text(step["state"], _COLOURS[step["state"]])
            began = clock(step["started_at"]) if step["started_at"] else ""
            table.add_row(name, step["name"], state, began, _took(step, "started_at"), step["detail"])
            name = ""
    return Group(table, *_bounds(change), *_compared(change), Text(), sentence(change))


def _bounds(change: Json) -> Iterator[Text]:
    """How many servers at once, how many away and how many workers were asked for, where any of it was."""
    said = [f"batch {change['batch']}"] if (change["batch"] or 1) > 1 else []
    said += [f"at most {change['max_unavailable']} away"] if change["max_unavailable"] else []
    said += [f"to {change['workers']} worker{'s' * (change['workers'] > 1)}"] if change["workers"] else []
    if said:
        yield Text(", ".join(said), "dim")


def _compared(change: Json) -> Iterator[RenderableType]:
    """What was planned beside what happened."""
    plan, outcome = change["plan"], change["outcome"]
    if plan is None:
        return
    table = _table("", "PLANNED", "OBSERVED")
    seen = outcome or {"server": ""}
    load = f"{seen['load']:.2f} × at {seen['server']}" if seen["server"] else "too few requests"
    rate = "not known" if plan["rate"] is None else f"{plan['rate']:.0f}/s"
    planned = f"{plan['load']:.2f} × at {plan['server']}" if plan["server"] else "no server serves"
    rows = (
        ("duration", duration(plan["duration"]), outcome and duration(outcome["duration"])),
        ("serving", f"at least {plan['serving']} of {plan['before']}", outcome and f"at least {outcome['serving']}"),
        ("peak load", planned, outcome and load),
        ("requests", rate, outcome and f"{outcome['rate']:.0f}/s"),
    )
    for name, *cells in rows:
        table.add_row(name, *(cell or "" for cell in cells))
    yield Text()
    yield table


def progress(change: Json, in_flight: dict[str, int]) -> RenderableType:
    """A change under way: where each of its servers is."""
    table = _table("SERVER", "STEP", ("FOR", "right"), ("IN FLIGHT", "right"), "PROGRESS", "DETAIL")
    for server, rows in groupby(_by_server(change), lambda step: step["server"]):
        mine = list(rows)
        ended = sum(step["ended_at"] is not None for step in mine)
        running = next((step for step in mine if step["state"] == "running"), None)
        failed = next((step for step in mine if step["state"] == "failed"), None)
        shown = running or failed
        idle = "done" if ended == len(mine) else "waits"
        table.add_row(
            server,
            Text(shown["name"], _COLOURS[shown["state"]])
            if shown
            else Text(idle, "green" if idle == "done" else "dim"),
            _took(shown, "started_at") if shown else "",
            str(in_flight.get(server, "")),
            bar(ended / len(mine)),
            shown["detail"] if shown else "",
        )
    return Group(sentence(change), table)


def leaving(server: Json, revision: int) -> str:
    """A server of an offline notice that was heard."""
    left = f"{server['in_flight']} still under way" if server["in_flight"] else "none is under way"
    return f"{server['upstream']}: {server['server']} gets no new request (table {revision}); {left}"


def hindrance(server: Json) -> str:
    """Why a server gets no requests."""
    if server["admin"] != "ready":
        return f"it is under {server['admin']}" if server["admin"] == "maint" else "it drains"
    health = server["health"] + (f" ({server['reason']})" if server["reason"] else "")
    return "; ".join([f"its health is {health}"] * (server["health"] != "up") + list(_notes(server))) or "not yet"


def _by_server(change: Json) -> list[Json]:
    """The steps of one server after those of the other, with those that were added when one failed."""
    order = {server: at for at, server in enumerate(dict.fromkeys(step["server"] for step in change["steps"]))}
    return sorted(change["steps"], key=lambda step: order[step["server"]])


def step_line(step: Json) -> str:
    """A step that has begun or ended, as one line for a log."""
    if step["ended_at"] is None:
        return f"{clock(step['started_at'])}  {step['server']}  {step['name']} …"
    took = f" in {_took(step, 'started_at')}" if step["started_at"] else ""
    detail = f": {step['detail']}" if step["detail"] else ""
    return f"{clock(step['ended_at'])}  {step['server']}  {step['name']} {step['state']}{took}{detail}"


def sentence(change: Json) -> Text:
    """How a change stands or ended."""
    what = f"change {change['id']}: {change['kind']} of {change['upstream']}"
    took = _took(change)
    match change["status"]:
        case "running":
            return Text(f"{what} runs since {took}", "cyan")
        case "queued":
            return Text(f"{what} waits for its turn since {took}", "yellow")
        case "paused":
            return Text(f"{what} is paused and begins no further server; it was begun {took} ago", "yellow")
        case "aborting":
            return Text(f"{what} is being aborted; it was begun {took} ago", "yellow")
        case "rolling-back":
            return Text(f"{what} is being rolled back; it was begun {took} ago", "yellow")
        case "failed" | "aborted" | "superseded" as status:
            return Text(f"{what} {status} after {took}: {change['error']}", _COLOURS[status])
        case _:
            return Text(f"{what} done in {took}", "green")


def plan(foreseen: Json) -> RenderableType:
    """A plan for people: how it goes, batch by batch, what to mind, and the batch to take."""
    known = [f"about {foreseen['rate']:.0f} requests/s"] if foreseen["rate"] is not None else []
    known += [f"{foreseen['in_flight']} in flight"] if foreseen["in_flight"] is not None else []
    count, size = foreseen["count"], foreseen["batch"]
    head = Text(
        f"{foreseen['kind']} of {foreseen['upstream']}: {count} batch{'es' * (count > 1)} of {size}, "
        f"about {duration(foreseen['duration'])}" + (f"; now {', '.join(known)}" if known else ""),
        "bold",
    )
    rows = _table("BATCH", "SERVERS", ("BEGINS", "right"), ("TAKES", "right"), ("CAPACITY", "right"), "PEAK LOAD")
    for number, batch in enumerate(foreseen["batches"], 1):
        rows.add_row(
            str(number),
            ", ".join(batch["servers"]),
            duration(batch["begins"]),
            duration(batch["ends"] - batch["begins"]),
            f"{batch['capacity']:.0%}",
            f"{batch['load']:.2f} × its usual share at {batch['server']}" if batch["server"] else "no server serves",
        )
    parts: list[RenderableType] = [head, rows]
    if count > len(foreseen["batches"]):
        parts.append(Text(f"{count - len(foreseen['batches'])} more batches are like these, or lighter", "dim"))
    chart = "".join(_CELLS[round(each["capacity"] * (len(_CELLS) - 1))] for each in foreseen["samples"])
    parts += [Text(), Text(f"capacity  {chart}  at least {foreseen['capacity']:.0%}")]
    parts += [Text(foreseen["surge"]), *warnings(foreseen)]
    if advice := foreseen["advice"]:
        parts.append(Text(_advice(advice), "green" if advice["safe"] else "yellow"))
    return Group(*parts)


def warnings(foreseen: Json) -> list[Text]:
    """What to mind, a line each."""
    return [Text(f"mind: {warning}", "yellow") for warning in foreseen["warnings"]]


def _advice(advice: Json) -> str:
    how = f"peak load {advice['load']:.2f} ×, about {duration(advice['duration'])}"
    if not advice["safe"]:
        return f"recommended: none; even one server at once is too much ({how}); add a server first"
    return f"recommended: --batch {advice['batch']} ({how}, a batch every {duration(advice['spacing'])})"


def event(record: Json) -> Text:
    """One event as a line."""
    return Text.assemble((date(record["at"]), "dim"), "  ", (f"{record['kind']:<11}", "cyan"), "  ", record["text"])


def history(answer: Json, now: float) -> Table:
    """Requests a second of each server, step by step, each with the events of its time; `·` where none was recorded.

    It begins with the first record. A step that is not over yet has no figures.
    """
    step, servers = answer["step"], answer["servers"]
    points = [{point["at"]: point for point in each["points"]} for each in servers]
    names: list[tuple[str, JustifyMethod]] = [(each["server"], "right") for each in servers]
    table = _table("TIME", *names, ("ERRORS", "right"), ("FAILURES", "right"), "EVENTS")
    told: dict[int, list[str]] = {}
    for event in answer["events"]:
        told.setdefault(int(event["at"] // step * step), []).append(event["text"])
    first = min([*told, *(at for each in points for at in each)], default=answer["until"])
    for at in range(first, answer["until"], step):
        found = [each.get(at) for each in points]
        over = at + step <= now
        rates = (
            [f"{point['requests'] / step:,.1f}" if point else "·" for point in found] if over else ["…"] * len(found)
        )
        lost = [sum(point[kind] for point in found if point) for kind in ("errors", "failures")] if over else [0, 0]
        when = clock(at) if time.localtime(at)[:3] == time.localtime(now)[:3] else date(at)
        table.add_row(
            when,
            *rates,
            *(Text(f"{each:,.0f}", "red") if each >= 0.5 else "" for each in lost),
            "\n".join(told.get(at, [])),
        )
    return table


def explanation(answer: Json) -> Text:
    """Questions and answers about a server."""
    text = Text()
    for story in answer["servers"]:
        text.append(f"{answer['upstream']}: {story['server']}\n", "bold")
        for each in story["answers"]:
            text.append(f"\n{each['question']}\n", "cyan")
            text.append("".join(f"  {sentence}\n" for sentence in each["sentences"]))
    return text


def bar(share: float, cells: int = 10) -> str:
    """A share of 1 as a bar."""
    full = int(share * cells + 1e-9)
    return "█" * full + "░" * (cells - full)


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 1:
        return f"{max(seconds, 0.0) * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def clock(at: float) -> str:
    """The time of day."""
    return time.strftime("%H:%M:%S", time.localtime(at))


def date(at: float) -> str:
    """Date and time of day."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _upstream(upstream: Json) -> tuple[RenderableType, ...]:
    table = _table(
        *("SERVER", "ADMIN", "HEALTH", "WEIGHT", "WARM-UP"),
        *(("IN FLIGHT", "right"), ("REQUESTS", "right"), ("FAILURES", "right")),
        "CHANGE",
    )
    for server in upstream["servers"]:
        table.add_row(
            server["address"],
            Text(server["admin"], _COLOURS[server["admin"]]),
            _health(server),
            _weight(server),
            _warm_up(server["warm_up"]),
            str(server["in_flight"]),
            f"{server['requests']:,}",
            Text(f"{server['failures']:,}", "red" if server["failures"] else ""),
            f"#{server['change']}" if server["change"] else "",
        )
    healthy = not upstream["fail_open"] and all(server["effective_weight"] > 0 for server in upstream["servers"])
    notes = (Text(f"{each['address']}: {why}", "yellow") for each in upstream["servers"] for why in _notes(each))
    return Text(serving(upstream), "bold green" if healthy else "bold yellow"), table, *notes


def _health(server: Json) -> Text:
    text = Text(server["health"], _COLOURS[server["health"]])
    if server["reason"]:
        text.append(f" ({server['reason']})", "dim")
    return text


def _notes(server: Json) -> Iterator[str]:
    """What a column is too narrow for: why a server does not get its share, whatever its health."""
    if server["held"]:
        yield f"held by change {server['held']}, which handles its process in another upstream; `enable` brings it back"
    for entry in server["quarantine"]:
        yield f"quarantined for {duration(entry['remaining'])} more ({entry['kind']}): {entry['why']}"
    if ejected := server["ejected"]:
        why = _EJECTED.get(ejected["reason"], ejected["reason"])
        times = "" if ejected["times"] < 2 else f", {ejected['times']} times by now"
        yield f"ejected by nginx for {duration(ejected['remaining'])} more: {why}{times}"
    if agent := server["agent"]:
        words = [f"weight {agent['weight']:.0%}"] if agent["weight"] != 1 else []
        words += [agent["admin"]] if agent["admin"] != "ready" else []
        words += [agent["down"]] if agent["down"] else []
        words += [f"at most {agent['max_conns']} requests at once"] if agent["max_conns"] else []
        yield f"its agent says: {', '.join(words)}"
    if server["warm_up"]["phase"] == "queued":
        yield "waits for its turn to warm up: enough of the upstream is cold already"
    if server["warm_up"]["phase"] == "held":
        yield f"its warm-up holds: {server['warm_up']['why']}"


def _weight(server: Json) -> str:
    effective = server["effective_weight"]
    return str(server["weight"]) if effective == server["weight"] else f"{server['weight']} → {effective:.3g}"


def _warm_up(warm_up: Json) -> str:
    phase = warm_up["phase"]
    if phase not in ("queued", "waiting", "running", "held"):
        return ""
    waits = {"queued": "queued", "waiting": "waits for a request", "held": "held"}
    text = waits.get(phase) or f"{duration(warm_up['duration'] - warm_up['elapsed'])} left"
    return f"{bar(warm_up['share'])} {warm_up['share']:.0%} {text}"


def _took(record: Json, since: str = "created_at") -> str:
    if record[since] is None:
        return ""
    return duration((record["ended_at"] or time.time()) - record[since])


def _table(*columns: str | tuple[str, JustifyMethod]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        name, justify = column if isinstance(column, tuple) else (column, _LEFT)
        table.add_column(name, justify=justify, overflow="fold")
    return table
