"""What Prometheus scrapes: built afresh at each scrape from the state and the counters, so that it cannot go stale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from controller.api.face import Runtime
from controller.api.views import UNSEEN
from controller.core.model import Admin, ChangeStatus, Health, Warmth
from controller.core.table import effective_weights


def registry(runtime: Runtime) -> CollectorRegistry:
    """A registry of its own that reads this runtime, and the daemon's own process, at each scrape."""
    own = CollectorRegistry(auto_describe=False)
    own.register(_Runtime(runtime))
    ProcessCollector(registry=own)
    return own


class _Runtime(Collector):
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def collect(self) -> Iterator[Metric]:
        state = self._runtime.state
        yield _one("headgate_revision", "Revision of the routing table that follows from the state.", state.revision)
        yield _one("headgate_plane_revision", "Revision of the routing table that nginx serves.", state.plane.revision)
        yield _one("headgate_plane_up", "Whether nginx answers on its control socket.", not state.plane.error)
        yield _one("headgate_plane_refuses", "Whether nginx refuses the newest table.", bool(state.plane.refused))
        yield _one("headgate_config_ok", "Whether nginx.conf could be read.", not state.config_error)
        yield _one("headgate_edge_offline", "Whether this edge host as a whole was taken offline.", state.offline)
        changes = GaugeMetricFamily("headgate_changes", "Changes that the daemon has in mind.", labels=["status"])
        counted = Counter(change.status for change in state.changes.values())
        for status in ChangeStatus:
            changes.add_metric([status], counted[status])
        yield changes
        yield from self._upstreams()
        yield from self._servers()

    def _upstreams(self) -> Iterator[Metric]:
        failing = GaugeMetricFamily(
            "headgate_upstream_fail_open",
            "Panic: whether too few servers are up, so that those that are down serve as well.",
            labels=["upstream"],
        )
        native = GaugeMetricFamily(
            "headgate_upstream_native_in_flight", "Requests in flight at an unknown server.", labels=["upstream"]
        )
        for name, group in self._runtime.state.groups.items():
            failing.add_metric([name], group.fail_open)
            native.add_metric([name], self._runtime.counters.native.get(name, 0))
        yield failing
        yield native

    def _servers(self) -> Iterator[Metric]:
        def gauge(name: str, text: str, *more: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"headgate_server_{name}", text, labels=["upstream", "server", *more])

        def counter(name: str, text: str) -> CounterMetricFamily:
            return CounterMetricFamily(f"headgate_server_{name}", text, labels=["upstream", "server"])

        admin = gauge("admin", "What the operator wants: 1 for the state that holds.", "state")
        health = gauge("health", "What the probes found: 1 for the state that holds.", "state")
        streak = gauge("probe_streak", "Probe results in a row; a result of the other kind sets it to 0.", "result")
        weight = gauge("weight", "Weight as configured.")
        effective = gauge("effective_weight", "Weight that the balancer reckons with now; 0: no new requests.")
        ejected = gauge("ejected", "Whether nginx keeps it away by itself.")
        quarantined = gauge(
            "quarantined", "Whether it is kept away for a time: by a notice or a mark, or by judgement."
        )
        queued = gauge("warm_up_queued", "Whether it waits for its turn to warm up.")
        held = gauge("warm_up_held", "Whether its warm-up holds, for it errs or is slow.")
        in_flight = gauge("in_flight", "Requests that are under way.")
        requests = counter("requests", "Tries since nginx started.")
        answered = counter("answered", "Tries that were answered.")
        errors = counter("errors", "Answers with a status of 5xx.")
        failures = counter("failures", "Tries without an answer.")
        timeouts = counter("timeouts", "Tries without an answer in time.")
        seconds = counter("response_seconds", "Time until the answers began, summed over those that were answered.")
        refused = counter("refused_marks", "Offline marks in its answers that were not believed.")
        now = self._runtime.clock.now()
        for name, group in self._runtime.state.groups.items():
            counters = self._runtime.counters.upstreams.get(name, {})
            weights = effective_weights(group, now)
            for server in group.upstream.servers:
                labels = [name, server.key]
                peer, seen = group.peers[server.key], counters.get(server.key, UNSEEN)
                _set(admin, labels, list(Admin), peer.admin)
                _set(health, labels, list(Health), peer.health)
                streak.add_metric([*labels, "pass"], peer.passes)
                streak.add_metric([*labels, "fail"], peer.fails)
                weight.add_metric(labels, server.weight)
                effective.add_metric(labels, weights[server.key])
                ejected.add_metric(labels, peer.ejected is not None)
                quarantined.add_metric(labels, bool(peer.quarantine))
                queued.add_metric(labels, peer.warm_up.phase is Warmth.QUEUED)
                held.add_metric(labels, peer.warm_up.phase is Warmth.HELD)
                in_flight.add_metric(labels, seen.in_flight)
                requests.add_metric(labels, seen.requests)
                answered.add_metric(labels, seen.answered)
                errors.add_metric(labels, seen.errors)
                failures.add_metric(labels, seen.failures)
                timeouts.add_metric(labels, seen.timeouts)
                seconds.add_metric(labels, seen.seconds)
                refused.add_metric(labels, seen.refused_marks)
        yield from (admin, health, streak, weight, effective, ejected, quarantined, queued, held)
        yield from (in_flight, requests, answered, errors, failures, timeouts, seconds, refused)


def _one(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _set(metric: GaugeMetricFamily, labels: list[str], states: Sequence[str], holds: str) -> None:
    for state in states:
        metric.add_metric([*labels, state], state == holds)
