"""What Prometheus reads: what the routes count, and the engine's own numbers as they are when it asks."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from ril_jax.sampling.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """The server's metrics, all named `ril_...`; docs/serving.md lists them."""

    def __init__(self, state: Callable[[], Any]):
        """`state()` gives (the engine or None, requests that are being prepared, whether requests are taken)."""
        disable_created_metrics()
        self._registry = CollectorRegistry(auto_describe=False)
        keep: Any = {"registry": self._registry}
        self.requests = Counter("ril_requests", "Answered requests, by status", ("endpoint", "status"), **keep)
        self.prompt_tokens = Counter("ril_prompt_tokens", "Tokens of answered prompts", **keep)
        self.completion_tokens = Counter("ril_completion_tokens", "Tokens of answers", **keep)
        self.first_token = Histogram(
            "ril_time_to_first_token_seconds", "From arrival to the first token", buckets=_SECONDS, **keep
        )
        self.inter_token = Histogram(
            "ril_inter_token_seconds", "Time a token, of those that come together", buckets=_TOKEN_SECONDS, **keep
        )
        self.end_to_end = Histogram("ril_request_seconds", "From arrival to the end", buckets=_SECONDS, **keep)
        self._registry.register(_EngineNumbers(state))

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineNumbers(Collector):
    def __init__(self, state: Callable[[], tuple[Engine | None, int, bool]]):
        self._state = state

    def collect(self) -> Iterator[Any]:
        engine, preparing, ready = self._state()
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield gauge("ril_ready", "Whether requests are taken", value=ready)
        yield gauge("ril_requests_preparing", "Requests whose prompts are being read", value=preparing)
        if engine is None:
            return
        hits, lookups = engine.prefix_hits
        stats = engine.stats
        yield gauge("ril_requests_waiting", "Requests that have no slot yet", value=engine.num_waiting)
        yield gauge("ril_samples_running", "Samples that are being decoded", value=engine.num_running)
        yield gauge("ril_slots", "Samples that can be decoded at once", value=engine.shapes.slots)
        yield gauge("ril_cache_use_ratio", "Share of the cache's pages that requests hold", value=engine.cache_use)
        yield counter("ril_prefix_chunks_found", "Prompt chunks that were in the cache", value=hits)
        yield counter("ril_prefix_chunks_looked_for", "Prompt chunks that were looked for", value=lookups)
        yield counter("ril_engine_requests", "Requests that were begun", value=stats.requests)
        yield counter("ril_engine_prompt_tokens", "Prompt tokens of those", value=stats.prompt_tokens)
        yield counter("ril_engine_prefilled_tokens", "Prompt tokens that were computed", value=stats.prefilled_tokens)
        yield counter("ril_engine_generated_tokens", "Tokens that were drawn", value=stats.generated_tokens)
        yield counter("ril_engine_images", "Images of requests that were begun", value=stats.images)
        yield counter("ril_engine_images_encoded", "Images that the vision tower saw", value=stats.images_encoded)
        yield counter("ril_engine_prefill_calls", "Calls of prefill programs", value=stats.prefill_calls)
        yield counter("ril_engine_decode_calls", "Calls of decode programs", value=stats.decode_calls)
        yield counter("ril_engine_decode_steps", "Steps in those", value=stats.decode_steps)
        yield counter("ril_unexpected_compilations", "Compilations after warm-up", value=engine.counter.after_warm)
