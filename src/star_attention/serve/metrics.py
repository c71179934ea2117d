"""What a server counts and measures, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from star_attention.serve.jobs import Job

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560)
_TOKENS = tuple(4**power for power in range(12))

Numbers = dict[tuple[str, str], dict[str, float]]
"""Values by label; the key is a metric's name and the name of its label ("" for none)."""


class Metrics:
    """A server's metrics, in a registry of their own. Labels never hold names or ids of clients.

    Args:
        gauges, counters: functions that return what others count, when it is asked for.
    """

    def __init__(self, gauges: Callable[[], Numbers], counters: Callable[[], Numbers]) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_Others(gauges, GaugeMetricFamily))
        registry.register(_Others(counters, CounterMetricFamily))

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"star:{name}", help, labels, registry=registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"star:{name}", help, buckets=buckets, registry=registry)

        self.ignored = counter("ignored_fields", "Fields of requests that had no effect", "field")
        self.errors = counter("request_errors", "Requests that failed, by code", "code")
        self.aborted = counter("request_aborted", "Requests whose client left", "phase")
        self.success = counter("request_success", "Answers, by why they ended", "finished_reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.generated = counter("generation_tokens", "Tokens of answers")
        self.queries = counter("prefix_cache_queries", "Tokens of prompts that could be kept")
        self.hits = counter("prefix_cache_hits", "Tokens of prompts that were kept")
        self.said = counter("conversation_tokens", "Tokens of prompts that conversations had kept")
        self.rules = counter("context_rules", "Prompts by the rule that cut them", "rule")
        self.first_token = histogram("time_to_first_token_seconds", "Request to first token")
        self.between = histogram("inter_token_latency_seconds", "Mean time between tokens")
        self.whole = histogram("e2e_request_latency_seconds", "Request to last token")
        self.waited = histogram("request_queue_time_seconds", "Request to its context being there")
        self.decoding = histogram("request_decode_time_seconds", "First token to last")
        self.step = histogram("step_seconds", "A step of all answers")
        self.of_prompt = histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self.of_answer = histogram("request_generation_tokens", "Tokens of an answer", _TOKENS)

    def finished(self, job: Job, prompt_tokens: int, kept: int, cached: int) -> None:
        """Note a job whose answers are all there.

        Args:
            job: the job.
            prompt_tokens: tokens of its prompt.
            kept, cached: those that are kept, and those that were before.
        """
        self.queries.inc(kept)
        self.hits.inc(cached)
        self.prompt_tokens.inc(prompt_tokens)
        self.of_prompt.observe(prompt_tokens)
        for choice in job.choices:
            assert choice.result is not None, "the job has ended"
            self.success.labels(choice.result.finish_reason).inc()
            self.said.inc(choice.result.kept_tokens)
            self.generated.inc(choice.tokens)
            self.of_answer.observe(choice.tokens)
            if choice.tokens > 1:
                self.between.observe((job.ended - job.first) / (choice.tokens - 1))
        self.waited.observe(job.started - job.created)
        self.first_token.observe(job.first - job.created)
        self.decoding.observe(job.ended - job.first)
        self.whole.observe(job.ended - job.created)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' format."""
        return generate_latest(self.registry)


class _Others:
    """Numbers that live elsewhere."""

    def __init__(self, numbers: Callable[[], Numbers], family: Any) -> None:
        self._numbers, self._family = numbers, family

    def describe(self) -> list[Any]:
        """Return nothing: the numbers are not known before they are asked for."""
        return []

    def collect(self) -> list[Any]:
        """Return the numbers as they are now."""
        families = []
        for (name, label), values in self._numbers().items():
            family = self._family(f"star:{name}", name, labels=[label] if label else [])
            for key, value in values.items():
                family.add_metric([key] if label else [], value)
            families.append(family)
        return families
