"""Metrics of requests and models, for Prometheus."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from slmops.infra.foundry.model_host import ModelHost
from slmops.infra.foundry.openai_server.errors import refusal_of

LATENCIES_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server."""

    def __init__(self, host: ModelHost) -> None:
        self._host = host
        self._registry = CollectorRegistry()
        shared: Any = {"registry": self._registry}
        labels = ["model"]
        histogram: Any = {"labelnames": labels, "buckets": LATENCIES_S, **shared}
        self._requests = Counter("slmops_requests", "Requests by model and HTTP status.", ["model", "code"], **shared)
        self._latency = Histogram("slmops_e2e_latency_seconds", "From a request to the end of its answer.", **histogram)
        self._ttft = Histogram("slmops_ttft_seconds", "From a request to the first text of a stream.", **histogram)
        self._tokens = Counter("slmops_tokens", "Tokens by model and kind.", ["model", "kind"], **shared)
        self._rss = Gauge("slmops_model_rss_bytes", "Resident memory of a model's process.", labels, **shared)
        self._active = Gauge("slmops_requests_active", "Requests that a model is answering.", labels, **shared)
        self._failures = Gauge(
            "slmops_model_failures", "Crashes and failed attempts to load, since its last answer.", labels, **shared
        )
        self._waiting = Gauge("slmops_requests_waiting", "Requests that wait for a model.", labels, **shared)

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        for gauge in (self._rss, self._active, self._waiting, self._failures):
            gauge.clear()
        for running in self._host.models:
            model_id = running.served.model_id
            self._rss.labels(model_id).set(running.process.rss_bytes if running.process else 0)
            self._active.labels(model_id).set(running.active)
            self._waiting.labels(model_id).set(running.waiting)
            self._failures.labels(model_id).set(running.failures)
        return generate_latest(self._registry)

    @contextmanager
    def counted(self, model: str, began: float) -> Iterator["CountedRequest"]:
        """Count a request: with the status of the raised refusal, or as answered after `CountedRequest.answered`."""
        request = CountedRequest(self, model, began)
        try:
            yield request
        except Exception as error:
            self._requests.labels(request.model, str(refusal_of(error).status)).inc()
            raise

    def _answered(self, model: str, status: int, seconds: float, usage: Mapping[str, Any]) -> None:
        self._requests.labels(model, str(status)).inc()
        self._latency.labels(model).observe(seconds)
        for kind in ("prompt", "completion"):
            self._tokens.labels(model, kind).inc(int(usage.get(f"{kind}_tokens") or 0))


class CountedRequest:
    """One request; `model` is empty until its name is known to be served; `began` is its start by `perf_counter`."""

    def __init__(self, metrics: Metrics, model: str, began: float) -> None:
        self.model = model
        self._metrics = metrics
        self._began = began

    def first_token(self) -> None:
        """Record the time to a stream's first text."""
        self._metrics._ttft.labels(self.model).observe(time.perf_counter() - self._began)

    def answered(self, status: int, usage: Mapping[str, object]) -> None:
        """Record the request's end, with the numbers of tokens that the runtime reported."""
        self._metrics._answered(self.model, status, time.perf_counter() - self._began, usage)
