"""Probes: http, https, tcp, gRPC and agent checks of many servers, each on a connection of its own (ports.Prober).

One connection a probe proves that the server accepts; a kept one would go on talking to a worker whose listener is
gone. prober.py has the rhythm, each other file what one kind of check says to a server, common.py what they share.
"""

from controller.adapters.probe.common import Endpoint, connect, reason_of
from controller.adapters.probe.prober import GRID, NetProber, ask

__all__ = ["GRID", "Endpoint", "NetProber", "ask", "connect", "reason_of"]
