"""One window of telemetry: the device's sensors and what each model version served since the last window."""

from __future__ import annotations

from edge_agent.inference import InferenceClient
from edge_agent.sensors import Sensors
from edge_agent.stats import VersionStats, quantile_ms, since
from edge_contract import wire
from edge_contract.errors import TransferFailed


class Sampler:
    """Keeps the last counts, so that each window holds differences."""

    def __init__(self, sensors: Sensors, inference: InferenceClient, now_ms: int) -> None:
        self._sensors = sensors
        self._inference = inference
        self._last_ms = now_ms
        self._last: dict[tuple[str, str], VersionStats] = {}

    def sample(self, now_ms: int, *, serving: bool) -> wire.Telemetry:
        """The window since the last call; models are left out while nothing serves."""
        window_s = max(0.001, (now_ms - self._last_ms) / 1000)
        self._last_ms = now_ms
        models = self._models(window_s) if serving else []
        return wire.Telemetry(now_ms, round(window_s, 3), self._sensors.sample(now_ms), models)

    def _models(self, window_s: float) -> list[wire.VersionTelemetry]:
        try:
            versions = self._inference.stats().versions
        except TransferFailed:
            return []  # the reported state says that nothing serves; the next window holds what is missing
        models = [self._window(v, window_s) for v in versions]
        self._last = {(v.name, v.digest): v for v in versions}
        return models

    def _window(self, now: VersionStats, window_s: float) -> wire.VersionTelemetry:
        part = since(now, self._last.get((now.name, now.digest)))
        quantiles = [quantile_ms(part.latency_counts, q) for q in (0.5, 0.95, 0.99)]
        p50, p95, p99 = (None if q is None else round(q, 4) for q in quantiles)
        return wire.VersionTelemetry(
            name=part.name,
            version=part.version,
            requests=part.requests,
            errors=part.errors,
            rate_per_s=round(part.requests / window_s, 3),
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
        )
