"""One step of a change, carried out by an adapter, and the notices that go out without one.

When, and what follows, is decided in core/change.py and core/notice.py.
"""

from __future__ import annotations

from uuid import uuid4

from controller.adapters.hooks import call
from controller.adapters.notice import Notice, notify
from controller.core.events import RunStep, StepDone
from controller.core.model import Group, Master, Server, StepName
from controller.core.policy import Policy, ProcessPolicy
from controller.ports import Check, Members, ProcessControl, ProcessError, Trial


async def tell(group: Group | None, key: str, at: float) -> str:
    """Tell the consumers of a server's upstream that it goes offline; who acknowledged, as a phrase."""
    server = _server(group, key)
    if group is None or server is None:
        return "nobody was told, for it is gone from nginx.conf"
    notice = Notice(group.upstream.name, server.key, server.ip, server.port, uuid4().hex, at)
    return await notify(group.upstream.policy.notices, notice)


async def carry_out(
    job: RunStep, group: Group | None, check: Check, processes: ProcessControl, at: float
) -> StepDone | None:
    """Do it and report; ProcessError, HookError. Each may be repeated after a crash. None: there is nothing to report.

    Edits of nginx.conf are not done here (`edit`).

    `group` is the job's upstream as it is now, None where nginx.conf has lost it, `check` how its servers are probed;
    `at` is seconds since the epoch.
    """
    if job.name is StepName.NOTIFY:
        return StepDone(job.change, job.step, await tell(group, job.server, at))
    server = _server(group, job.server)
    policy = group.upstream.policy if group else None
    if server is None or policy is None:
        raise ProcessError(f"{job.upstream}: {job.server} is gone", "see `headgate status`")
    mark = f"{job.upstream} {job.server} {job.change}-{job.step}"  # the same when it is repeated
    match job.name:
        case StepName.BEFORE_DRAIN | StepName.AFTER_DRAIN | StepName.AFTER_UP:
            said = await call(getattr(policy.hooks, job.name), job.upstream, server)
            return StepDone(job.change, job.step, said)
        case StepName.UP:
            await _watch(job.master, policy, processes)
            return None
    process = policy.process
    if process is None:
        message = f"{job.upstream}: its process settings are gone"
        raise ProcessError(message, f"write [upstream.{job.upstream}.process] into headgate.toml again")
    match job.name:
        case StepName.FIND:
            found = await processes.find(job.upstream, server, process)
            text = f"master {found.pid} with {len(found.workers)} workers" if found else "no process is running"
            return StepDone(job.change, job.step, text, found)
        case StepName.START:
            started = await processes.start(job.upstream, server, process, mark)
            return StepDone(job.change, job.step, f"master {started.pid} listens", started)
        case StepName.DEPLOY | StepName.ROLL_BACK:
            command = process.deploy if job.name is StepName.DEPLOY else process.roll_back
            await processes.run(command, job.upstream, server, process, mark)
            return StepDone(job.change, job.step, f"`{command[0]}` has done it")
    if job.master is None:
        return StepDone(job.change, job.step, "no process was running")
    if job.name in (StepName.TERMINATE, StepName.EXIT, StepName.KILL):
        return await _end(job, job.master, server, process, processes)
    if job.name is StepName.UPGRADE:
        trial = Trial(check, policy.health.rise, policy.rollout.up_timeout)
        new = await processes.upgrade(server, job.master, process, trial)
        text = f"the new master {new.pid} and its {len(new.workers)} workers serve beside {job.master.pid}"
        return StepDone(job.change, job.step, text, new)
    return await _change(job, job.master, process, processes)


async def edit(job: RunStep, members: Members) -> StepDone:
    """Have the server's line stand in nginx.conf, or not; ConfigError, CheckFailed, WriteFailed. May be repeated."""
    if job.name is StepName.ADD:
        return StepDone(job.change, job.step, await members.add(job.upstream, job.server, job.weight))
    return StepDone(job.change, job.step, await members.remove(job.upstream, job.server))


def _server(group: Group | None, key: str) -> Server | None:
    return next((s for s in group.upstream.servers if s.key == key), None) if group else None


async def _watch(master: Master | None, policy: Policy, processes: ProcessControl) -> None:
    """ProcessError as soon as a new master has ended; return when it is up at the latest. systemd looks after units."""
    if master and not master.unit and await processes.ended(master, policy.rollout.up_timeout):
        raise ProcessError(f"its master {master.pid} has ended", "see its log")


async def _end(
    job: RunStep, master: Master, server: Server, policy: ProcessPolicy, processes: ProcessControl
) -> StepDone:
    async def alone() -> None:
        # Nothing of ours has been started in these steps, so whatever is there is somebody else's.
        if job.alone:
            await processes.unreplaced(job.upstream, server, master, policy)

    if job.name is StepName.TERMINATE:
        await alone()
        await processes.terminate(master, policy)
        return StepDone(job.change, job.step, f"asked {master.unit or master.pid} to stop")
    if job.name is StepName.EXIT:
        limit = policy.graceful_timeout + policy.margin
        gone = await processes.wait_exit(master, limit)
        if gone:
            await alone()
        text = "and its workers are gone" if gone else f"is still there after {limit:g} s"
        return StepDone(job.change, job.step, f"{master.pid} {text}", gone=gone)
    killed = await processes.kill(master, policy)
    await alone()
    return StepDone(job.change, job.step, f"killed {', '.join(map(str, killed)) or 'nothing: all were gone'}")


async def _change(job: RunStep, master: Master, policy: ProcessPolicy, processes: ProcessControl) -> StepDone:
    if job.name is StepName.RELOAD:
        after = await processes.reload(master)
        text = f"asked {master.pid} for new workers"
    elif job.name is StepName.WORKERS:
        after = await processes.renewed(master, policy)
        text = f"{len(after.workers)} new workers accept requests"
    else:
        after = await processes.scale(master, job.workers, policy)
        text = f"{len(after.workers)} workers, before {len(master.workers)}"
    return StepDone(job.change, job.step, text, after)
