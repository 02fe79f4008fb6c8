"""Prometheus metrics of a server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


class ServingMetrics:
    """Metrics of one engine, in a registry that no other engine shares."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.first_chunk = Histogram(
            "mfctl_first_chunk_seconds", "Start of a session to its first chunk.", buckets=_SECONDS, registry=r
        )
        self.chunk_period = Histogram(
            "mfctl_chunk_period_seconds", "Time between two chunks of a session.", buckets=_SECONDS, registry=r
        )
        self.event_applied = Histogram(
            "mfctl_event_applied_seconds",
            "Acceptance of an event to the chunk in which it starts.",
            buckets=_SECONDS,
            registry=r,
        )
        self.chunks_ahead = Histogram(
            "mfctl_chunks_ahead", "Chunks beyond the playhead.", buckets=(0.5, 1, 1.5, 2, 3, 4), registry=r
        )
        self.rows = Histogram(
            "mfctl_rows_per_pass", "Sessions of a forward pass, per chunk.", buckets=(1, 2, 4, 8, 16, 32), registry=r
        )
        self.missed_deadlines = Counter(
            "mfctl_missed_deadlines", "Chunks that were made after the viewer reached them.", registry=r
        )
        self.sessions = Gauge("mfctl_sessions", "Sessions that are served.", registry=r)
        self.session_bytes = Gauge("mfctl_session_bytes", "Bytes of a session with a full cache.", registry=r)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
