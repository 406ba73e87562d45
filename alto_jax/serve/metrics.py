"""What the service counts, for Prometheus; a registry of its own for each service."""

from collections.abc import Callable
import threading
from typing import Any

import jax
import prometheus_client as prometheus

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_compiled = [0]
_lock = threading.Lock()


def _count(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        with _lock:
            _compiled[0] += 1


prometheus.disable_created_metrics()  # Note: when each series began doubles the text, and nobody asks.
# Note: JAX offers no way to take one listener back; one for the whole process is enough.
jax.monitoring.register_event_duration_secs_listener(_count)


def compilations() -> int:
    """Programs that this process has compiled, or read from JAX's cache, since the service was imported."""
    return _compiled[0]


class Metrics:
    """Counters and histograms; `text()` is what /metrics shows."""

    def __init__(self, batch_sizes: tuple[int, ...], queue_depth: Callable[[], int], in_flight: Callable[[], int]):
        """Takes the batch sizes, and functions that tell the masks in the queue and the requests that are accepted."""
        self.registry = prometheus.CollectorRegistry()
        own: Any = {"registry": self.registry}
        counter, histogram = prometheus.Counter, prometheus.Histogram
        self.requests = counter("alto_requests", "Requests, by path and HTTP status", ["path", "status"], **own)
        self.faults = counter("alto_faults", "Refused and failed requests, by code", ["code"], **own)
        self.seconds = histogram("alto_request_seconds", "From a request's headers to the end of its response",
                                 ["path"], buckets=_SECONDS, **own)  # fmt: skip
        self.waited = histogram("alto_queue_seconds", "That a mask waited for its batch", buckets=_SECONDS, **own)
        self.computed = histogram("alto_batch_seconds", "Of the model, a batch", buckets=_SECONDS, **own)
        self.rows = histogram("alto_batch_masks", "Masks of a batch, without the fill", buckets=batch_sizes, **own)
        self.padding = counter("alto_batch_fill", "Rows that only filled a batch up", **own)
        self.masks = counter("alto_masks", "Masks that were computed", **own)
        self.tokens = counter("alto_mask_tokens", "Mask tokens that were generated", **own)
        self.dropped = counter("alto_dropped_masks", "Masks given up while they waited, and not computed", **own)
        self.images = counter("alto_images", "Images, by whether they had been seen before", ["seen"], **own)
        prometheus.Gauge("alto_queue_depth", "Masks that wait or are computed", **own).set_function(queue_depth)
        prometheus.Gauge("alto_requests_in_flight", "Accepted, not answered", **own).set_function(in_flight)
        prometheus.Gauge("alto_programs_compiled", "By this process; constant after the warm-up", **own).set_function(
            compilations
        )
        prometheus.ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return prometheus.generate_latest(self.registry)
