"""One step of a change, carried out by an adapter. When, and what follows, is decided in core/change.py."""

from __future__ import annotations

from uuid import uuid4

from controller.adapters.hooks import call
from controller.adapters.notice import Notice, notify
from controller.core.events import RunStep, StepDone
from controller.core.model import Group, StepName
from controller.core.policy import HookPolicy
from controller.ports import ProcessControl, ProcessError


async def carry_out(job: RunStep, group: Group | None, processes: ProcessControl, at: float) -> StepDone:
    """Do it and report; ProcessError, HookError. Each may be repeated after a crash.

    `group` is the job's upstream as it is now, None where nginx.conf has lost it; `at` is seconds since the epoch.
    """
    server = next((s for s in group.upstream.servers if s.key == job.server), None) if group else None
    policy = group.upstream.policy.process if group else None
    if server is None or policy is None:
        message = f"{job.upstream}: {job.server} or its process settings are gone"
        raise ProcessError(message, "see `headgate status`")
    name, master = job.name, job.master
    hooks = group.upstream.policy.hooks if group else HookPolicy()
    if name in (StepName.BEFORE_DRAIN, StepName.AFTER_DRAIN, StepName.AFTER_UP):
        return StepDone(job.change, job.step, await call(getattr(hooks, name), job.upstream, server))
    if name is StepName.NOTIFY and group:
        notice = Notice(job.upstream, server.key, server.ip, server.port, uuid4().hex, at)
        return StepDone(job.change, job.step, await notify(group.upstream.policy.notices, notice))
    if name is StepName.FIND:
        found = await processes.find(job.upstream, server, policy)
        text = f"master {found.pid} with {len(found.workers)} workers" if found else "no process is running"
        return StepDone(job.change, job.step, text, found)
    if name is StepName.START:
        started = await processes.start(job.upstream, server, policy)
        return StepDone(job.change, job.step, f"master {started.pid} listens", started)
    if master is None:
        return StepDone(job.change, job.step, "no process was running")
    if name is StepName.TERMINATE:
        await processes.terminate(master, policy)
        return StepDone(job.change, job.step, f"asked {master.unit or master.pid} to stop")
    if name is StepName.EXIT:
        limit = policy.graceful_timeout + policy.margin
        gone = await processes.wait_exit(master, limit)
        text = "and its workers are gone" if gone else f"is still there after {limit:g} s"
        return StepDone(job.change, job.step, f"{master.pid} {text}", gone=gone)
    killed = await processes.kill(master, policy)
    return StepDone(job.change, job.step, f"killed {', '.join(map(str, killed)) or 'nothing: all were gone'}")
