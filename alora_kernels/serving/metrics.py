"""What an engine counts, as Prometheus metrics, which the server shows under `/metrics`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .request import Completion

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
BASE_LABEL = "(base)"  # parentheses are in no task's name


class Metrics:
    """Counters and histograms of one engine in a registry of its own; `answered` requests ended without an error."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "alora_requests", "requests that have ended", ["task", "finish_reason"], registry=registry
        )
        self.refused = Counter("alora_requests_refused", "requests that were not taken", ["reason"], registry=registry)
        self.prompt_tokens = Counter("alora_prompt_tokens", "tokens of prompts", ["task"], registry=registry)
        self.tokens = Counter("alora_generated_tokens", "tokens generated", ["task"], registry=registry)
        self.first_token = Histogram(
            "alora_time_to_first_token_seconds", "from submission to first token", registry=registry, buckets=SECONDS
        )
        self.seconds = Histogram(
            "alora_request_seconds", "from submission to the end", registry=registry, buckets=SECONDS
        )
        self.batch_tokens = Histogram("alora_batch_tokens", "tokens in a step", registry=registry, buckets=ROWS)
        self.batch_requests = Histogram("alora_batch_requests", "requests in a step", registry=registry, buckets=ROWS)
        self.restarts = Counter(
            "alora_engine_restarts", "generation loops that died and were replaced", registry=registry
        )
        self.answered = 0

    def gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Add a value that is read when it is asked for."""
        Gauge(name, what, registry=self.registry).set_function(read)

    def ended(self, completion: Completion) -> None:
        """Count a request that has ended."""
        self.answered += completion.finish_reason != "error"
        task = BASE_LABEL if completion.task is None else completion.task
        self.requests.labels(task, completion.finish_reason).inc()
        self.prompt_tokens.labels(task).inc(completion.prompt_tokens)
        self.tokens.labels(task).inc(completion.completion_tokens)
        if completion.first_token is not None:
            self.first_token.observe(completion.first_token)
        self.seconds.observe(completion.seconds)

    def text(self) -> bytes:
        """The registry in Prometheus' text format."""
        return generate_latest(self.registry)
