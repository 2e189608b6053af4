"""A worker's counters for Prometheus, and for whatever reads its format (OpenTelemetry's collector does).

Needs the extra: `pip install 'housecall[metrics]'`. Nothing here is about values, tensors or names of data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

__all__ = ["StatusCollector", "serve_metrics"]

_COUNTERS = {
    "sessions": "Sessions opened.",
    "resumed": "Sessions resumed after a break.",
    "expired": "Sessions whose lease ended.",
    "refused": "Streams refused.",
    "failed_calls": "Messages that failed, refusals among them.",
    "refused_calls": "Messages refused: limits, policies, unknown operators.",
    "late": "Sessions cut since a frame of theirs did not come on while others waited.",
    "frames": "Frames done.",
    "messages": "Messages in them.",
    "bytes_in": "Bytes of frames that came.",
    "bytes_out": "Bytes of replies that left.",
}


class StatusCollector:
    """Reads a worker's status whenever it is asked."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        status = self._status()
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"housecall_{name}", text, value=status["counters"].get(name, 0))
        yield CounterMetricFamily("housecall_busy_seconds", "Time spent computing.", value=status["busy_s"])
        yield CounterMetricFamily("housecall_restarts", "Its process was started anew.", value=status["restarts"])
        if (certificate := status["certificate"]) is not None:
            until = certificate["until"]
            yield GaugeMetricFamily("housecall_certificate_until_seconds", "When its certificate ends.", value=until)
        sessions = status["sessions"]
        yield GaugeMetricFamily("housecall_open_sessions", "Sessions that are kept.", value=len(sessions))
        yield GaugeMetricFamily(
            "housecall_connected_sessions",
            "Of them, those whose client is there.",
            sum(s["connected"] for s in sessions),
        )
        yield GaugeMetricFamily("housecall_slots", "Tensors held.", value=sum(s["slots"] for s in sessions))
        yield GaugeMetricFamily(
            "housecall_waiting_frames", "Frames that wait for their turn.", sum(s["waiting"] for s in sessions)
        )


def serve_metrics(status: Callable[[], dict[str, Any]], host: str, port: int) -> Callable[[], None]:
    """Answer HTTP at host:port with the metrics; call what this returns to end it."""
    registry = CollectorRegistry()
    registry.register(StatusCollector(status))
    server, thread = start_http_server(port, host, registry)

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end
