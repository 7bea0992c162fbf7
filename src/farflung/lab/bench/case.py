"""What one row of a benchmark is run with, and the swarm it needs. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from farflung.core.errors import UsageError
from farflung.lab.access import Access, profile
from farflung.lab.net.profiles import PROFILES, Connection, named_connection
from farflung.lab.net.topology import LabNode, Topology
from farflung.lab.plan import plan_ring
from farflung.planning.cost import Curve, Ring

DIRECTORY, DRIVER = "directory", "driver"

REPLAY_MODEL = "70b-4bit"
REPLAY_LAYERS, REPLAY_HIDDEN, REPLAY_VOCABULARY = 80, 8192, 152064
REPLAY_STEP_MS = (48.0, 0.8)
"""Of the whole model, and per token: 70B in 4 bits at the memory bandwidth of a good desktop machine."""

REPLAY_OVERHEAD_MS = 1.0
"""Of each stage and step."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network, one model in so many stages.

    Attributes:
        net: what to call the network; ``connection`` what each member of the swarm has.
        backend: ``real`` (processes of ``farflung node``) or ``replay`` (times from a curve, tokens from a hash or traces).
        model: a name that ``farflung node --model`` takes; for ``replay`` a name alone.
        dtype, threads: of real stages.
        codec: between stages.
        tokens: decoded in each repeat, after a warm-up.
        sessions: that run together in the suite ``many``.
        traces: folder of recorded paths for ``replay``.
        reached_bytes_per_s: what links of it reach, at most their rate; None: what the profile is known for.
    """

    net: str
    connection: Connection
    backend: str = "real"
    model: str = "gemma3-270m"
    stages: int = 3
    dtype: str = "auto"
    threads: int = 1
    codec: str = "int8"
    prompt_tokens: int = 64
    tokens: int = 64
    sessions: int = 1
    repeats: int = 3
    seed: int = 1
    traces: Path | None = None
    reached_bytes_per_s: float | None = None
    by_hand: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.backend not in ("real", "replay"):
            raise UsageError(f"--backend {self.backend[:40]!r} is unknown", hint="use real or replay")
        if min(self.stages, self.tokens, self.repeats, self.prompt_tokens, self.sessions) < 1:
            raise UsageError("stages, tokens, repeats, prompt tokens and sessions are at least 1")

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The nodes of the lab that serve, in the order of their layers."""
        return tuple(f"stage{number}" for number in range(1, self.stages + 1))

    @property
    def access(self) -> Access:
        """The same line as the planner sees it, with the rate that a warm stream reaches."""
        name = self.net.partition("+")[0]
        base = profile(name) if name in PROFILES else Access()
        line = self.connection
        found = dataclasses.replace(
            base,
            up_mbps=line.up_mbps,
            down_mbps=line.down_mbps,
            rtt_ms=line.rtt_ms,
            jitter_ms=line.total_jitter_ms,
            loss_pct=line.loss_pct,
        )
        if self.reached_bytes_per_s is None or not found.up_mbps:
            return found
        of_all = dataclasses.replace(found, reached_share=1.0).up_bytes_per_s or math.inf
        return dataclasses.replace(found, reached_share=min(1.0, self.reached_bytes_per_s / of_all))

    def topology(self) -> Topology:
        """Driver and stages on the network in question; the directory, through which no token passes, close to all."""
        members = [LabNode(name, self.net, self.connection) for name in (DRIVER, *self.stage_names)]
        return Topology((LabNode(DIRECTORY, "lan", PROFILES["lan"]), *members), seed=self.seed)

    def about(self, rung: str = "emulate") -> dict[str, object]:
        """What every row says of its case."""
        return {
            **(self.by_hand or {"net": self.net}),
            "backend": self.backend,
            "model": self.model,
            "stages": self.stages,
            "rung": rung,
            "codec": self.codec,
        }

    def ring(self, hidden_size: int, curves: Sequence[Curve]) -> Ring:
        """The route as the planner sees it, its stages having those T-curves."""
        stages = [(self.access, curve) for curve in curves]
        return plan_ring(self.access, stages, codec_name=self.codec, hidden_size=hidden_size)

    def replay_curve(self) -> tuple[tuple[int, float], ...]:
        """T-curve of one of the stages."""
        base, per_token = REPLAY_STEP_MS
        return tuple((n, (base + per_token * n) / self.stages + REPLAY_OVERHEAD_MS) for n in (1, 4096))

    def replay_layers(self, stage: int) -> tuple[int, int]:
        """First layer of stage 0, 1, ... and the one after its last."""
        return REPLAY_LAYERS * stage // self.stages, REPLAY_LAYERS * (stage + 1) // self.stages


def connections(names: str, by_hand: dict[str, float]) -> list[tuple[str, Connection]]:
    """The networks of ``--net a,b``, or the one that ``--rtt-ms`` and its like describe. Raises UsageError."""
    given = {key: value for key, value in by_hand.items() if value}
    if given and names:
        raise UsageError("--net and numbers of a network exclude each other", hint="give --net, or --rtt-ms and --up-mbps")
    if given:
        line = Connection(
            up_mbps=given.get("up_mbps", 0.0),
            down_mbps=given.get("down_mbps", 0.0),
            rtt_ms=given.get("rtt_ms", 0.0),
            jitter_pct=given.get("jitter_pct", 0.0),
            loss_pct=given.get("loss_pct", 0.0),
            jitter_distribution="lognormal",
        )
        return [(" ".join(f"{key}={value:g}" for key, value in given.items()), line)]
    return [(name, named_connection(name)) for name in (names or "fiber,cable,5g,intercontinental").split(",")]
