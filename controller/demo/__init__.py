"""The demo: a real rolling restart on this machine, with traffic, figures and everything cleaned up afterwards."""

from __future__ import annotations


def run(once: bool) -> int:
    """Run the demo and return its exit status: 0 only when the rollout is done and no request has failed.

    With `once` it ends by itself; otherwise it stays up, under a light load, until Ctrl-C or TERM.
    """
    # The applications and the load generator live in this package too, and need none of what the demo imports.
    from controller.demo.run import run as run_demo

    return run_demo(once)
