"""What one generation measured."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median, quantiles

from farflung.core.ids import NodeId
from farflung.core.messages import Report, StageTime
from farflung.core.model import LayerRange
from farflung.core.route import Route


@dataclass(frozen=True)
class StageStats:
    """What one stage reported at the end.

    Attributes:
        node_id, layers: which.
        decode_ms: mean time of a decode step there.
        prefill_ms: time of all prompt steps there.
        decode_bytes: mean bytes it sent on per decode window (the tail: to the driver).
        bytes_out: bytes it sent on in all.
    """

    node_id: NodeId
    layers: LayerRange
    decode_ms: float
    prefill_ms: float
    decode_bytes: float
    bytes_out: int

    @classmethod
    def of(cls, layers: LayerRange, report: Report) -> StageStats:
        windows = max(1, report.decode_windows)
        return cls(
            report.node_id,
            layers,
            report.decode_compute_ms / windows,
            report.compute_ms - report.decode_compute_ms,
            report.decode_bytes_out / windows,
            report.bytes_out,
        )


@dataclass
class GenerationStats:
    """Live while the generation runs. Times in seconds.

    Attributes:
        route: the stages that compute it.
        prompt_tokens: length of the prompt; chunk_tokens: of it in each window.
        token_ids, text: what was generated so far.
        ttft_s: from asking to the first token, dialling included; None before it.
        inter_token_s: time between tokens as they arrived.
        rounds: windows sent that wanted an answer.
        bytes_sent, bytes_received: of this driver's links during the generation, TLS included, heartbeats apart.
        stages: one per stage that reported, in route order; known at the end.
        timelines: of some windows, what became of them at every stage, in route order; the newest last.
        reconnects: broken lines to stages that were taken up again.
    """

    route: Route | None = None
    prompt_tokens: int = 0
    chunk_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    ttft_s: float | None = None
    inter_token_s: list[float] = field(default_factory=list)
    rounds: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    stages: list[StageStats] = field(default_factory=list)
    timelines: deque[tuple[StageTime, ...]] = field(default_factory=lambda: deque(maxlen=64))
    reconnects: int = 0

    @property
    def decode_tokens_per_s(self) -> float:
        """Rate after the first token; 0 before the second."""
        total_s = sum(self.inter_token_s)
        return len(self.inter_token_s) / total_s if total_s > 0 else 0.0

    def inter_token_ms(self) -> dict[str, float]:
        """Median and 95th percentile of the time between tokens."""
        times_ms = [1e3 * time_s for time_s in self.inter_token_s]
        if len(times_ms) < 2:
            return {"p50": sum(times_ms), "p95": sum(times_ms)}
        return {"p50": median(times_ms), "p95": quantiles(times_ms, n=20, method="inclusive")[-1]}

    def bytes_per_token(self) -> dict[str, float]:
        """Per decoded token: the largest between two stages, the sum over all stages, and this driver's."""
        between = [stage.decode_bytes for stage in self.stages[:-1]]
        tokens = max(1, len(self.token_ids))
        driver_up, driver_down = self.bytes_sent / tokens, self.bytes_received / tokens
        return {
            "between_stages_max": max(between, default=0.0),
            "total": sum(between) + driver_up + driver_down,
            "driver_up": driver_up,
            "driver_down": driver_down,
        }
