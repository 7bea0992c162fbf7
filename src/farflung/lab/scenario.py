"""Scenarios of ``farflung lab simulate``: swarm, model, load and faults as data, read from TOML.

    seed = 7

    [model]
    name = "70b-4bit"
    layers = 80
    hidden_size = 8192
    vocab_size = 152064

    [[nodes]]                       # n1 ... n8: four stages, two nodes each
    stages = 4
    replicas = 2
    step_ms = [13.0, 0.2]           # 13 ms and 0.2 ms per token; or curve_ms = [[1, 13.2], [256, 64.2]]
    net = { profile = "fiber" }

    [[drivers]]                     # d1
    net = { profile = "cable" }

    [[load]]
    name = "chat"
    sessions = 10
    prompt_tokens = 64
    max_tokens = 100
    every_s = 0.5

    [[faults]]
    at_s = 3.0
    kind = "crash"
    node = "n3"

An unknown key, a value of the wrong type and a name that nobody has are refused, naming file and key.
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import asdict as fields_of

from farflung.core.errors import ConfigError, FarflungError, UsageError
from farflung.core.model import LayerRange
from farflung.lab.access import Access, profile
from farflung.wire.codec import CODEC_NAMES

MAX_MEMBERS = 100_000
LAST_TOKENS = 4096
"""Of a stage time given as a straight line: from there on the time per token stays as it is."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a scenario."""


class Net(_Part, frozen=True, kw_only=True):
    """A member's access: a profile, and numbers that differ from it (``lab.access.Access``)."""

    profile: str = ""
    up_mbps: float | UnsetType = UNSET
    down_mbps: float | UnsetType = UNSET
    rtt_ms: float | UnsetType = UNSET
    jitter_ms: float | UnsetType = UNSET
    jitter_memory_ms: float | UnsetType = UNSET
    loss_pct: float | UnsetType = UNSET
    reached_share: float | UnsetType = UNSET

    def __post_init__(self) -> None:
        try:
            found = self.access
        except UsageError as error:  # msgspec names the key of a ValueError
            raise ValueError(f"{error.message} ({error.hint})") from error
        if not (min(asdict(found).values()) >= 0 and found.loss_pct < 100 and 0 < found.reached_share <= 1):
            raise ValueError(f"{found} is no access: rates and times are at least 0, losses below 100, shares at most 1")

    @property
    def access(self) -> Access:
        """Raises UsageError for an unknown profile."""
        known = profile(self.profile) if self.profile else Access()
        given = {key: value for key, value in fields_of(self).items() if value is not UNSET and key != "profile"}
        return replace(known, **given)


class Model(_Part, frozen=True, kw_only=True):
    """The shape of the model; see ``engine.replay_backend.ReplayModel``."""

    name: str
    layers: int
    hidden_size: int
    vocab_size: int = 152064
    context_tokens: int = 32768


class Nodes(_Part, frozen=True, kw_only=True):
    """Nodes that are alike.

    Attributes:
        name: they are called ``name`` and a number.
        stages: the layers are cut into so many ranges, as equal as can be.
        replicas: nodes of each range.
        layers: ``A:B``, one range for all of them instead.
        step_ms: time of a step: a constant and an addend per token ...
        curve_ms: ... or points of (tokens, ms).
        kv_tokens: of each node.
        net: how they are connected.
    """

    name: str = "n"
    stages: int = 1
    replicas: int = 1
    layers: str = ""
    step_ms: tuple[float, float] | None = None
    curve_ms: tuple[tuple[int, float], ...] = ()
    kv_tokens: int = 65536
    net: Net = Net()

    def __post_init__(self) -> None:
        if min(self.stages, self.replicas, self.kv_tokens) < 1:
            raise ValueError("stages, replicas and kv_tokens are at least 1")
        if (self.step_ms is None) == (not self.curve_ms):
            raise ValueError("a group of nodes has either step_ms or curve_ms")
        rises = all(before[0] < after[0] for before, after in pairwise(self.curve))
        if not rises or self.curve[0][0] < 1 or min(ms for _, ms in self.curve) < 0:
            raise ValueError("the tokens of a T-curve rise from 1, its times are at least 0")

    @property
    def curve(self) -> tuple[tuple[int, float], ...]:
        """As for ``planning.curve.time_ms``."""
        if self.step_ms is None:
            return self.curve_ms
        base, per_token = self.step_ms
        return tuple((tokens, base + per_token * tokens) for tokens in (1, LAST_TOKENS))

    def ranges(self, model_layers: int) -> list[LayerRange]:
        """What each of these nodes serves: a whole set of stages, then the next replica of each."""
        if self.layers:
            return [LayerRange.parse(self.layers)] * self.replicas
        bounds = [round(model_layers * stage / self.stages) for stage in range(self.stages + 1)]
        return [LayerRange(start, stop) for start, stop in pairwise(bounds)] * self.replicas


class Drivers(_Part, frozen=True, kw_only=True):
    """Drivers that are alike.

    Attributes:
        name: they are called ``name`` and a number.
        count: how many.
        sees: of each range of layers, as many nodes as this, drawn from the seed; 0: all. One driver of a large swarm has
            measured some of its nodes, and drivers that all see everything all take the same route.
        net: how they are connected.
    """

    name: str = "d"
    count: int = 1
    sees: int = 0
    net: Net = Net()


class Load(_Part, frozen=True, kw_only=True):
    """Sessions that are alike; each group makes a row of the result.

    Attributes:
        name: of the row.
        drivers: of which drivers; their sessions come in turns.
        sessions: how many.
        prompt_tokens: drawn from the seed; with ``traces`` a session has the prompt of a trace instead.
        max_tokens: generated by each.
        chunk_tokens: prompt tokens per window; 0: the driver chooses.
        codecs: as of ``GenerateOptions``.
        start_s: of the first.
        every_s: between one and the next ...
        random: ... on average only: the times between are exponential.
        one_by_one: each begins when the one before has ended, after ``every_s``.
        batch: they can wait.
        traces: sessions follow the scenario's traces, in turns.
    """

    name: str = "load"
    drivers: str = "d"
    sessions: int = 1
    prompt_tokens: int = 32
    max_tokens: int = 64
    chunk_tokens: int = 128
    codecs: tuple[str, ...] = ("int8",)
    start_s: float = 0.0
    every_s: float = 0.0
    random: bool = False
    one_by_one: bool = False
    batch: bool = False
    traces: bool = False

    def __post_init__(self) -> None:
        if min(self.sessions, self.prompt_tokens, self.max_tokens) < 1:
            raise ValueError("sessions, prompt_tokens and max_tokens are at least 1")
        if min(self.start_s, self.every_s, self.chunk_tokens) < 0:
            raise ValueError("start_s, every_s and chunk_tokens are at least 0")
        if not self.codecs:
            raise ValueError("codecs names at least one")
        if unknown := set(self.codecs).difference(CODEC_NAMES):
            raise ValueError(f"there are no codecs {sorted(unknown)}, known are {', '.join(CODEC_NAMES)}")


class Fault(_Part, frozen=True, kw_only=True):
    """Something that breaks, or heals.

    Attributes:
        at_s: when.
        kind: ``crash`` of ``node``; between ``a`` and ``b``: ``cut`` resets their links, ``silence`` swallows all that is sent,
            ``heal`` ends a silence.
    """

    at_s: float
    kind: Literal["crash", "cut", "silence", "heal"]
    node: str = ""
    a: str = ""
    b: str = ""

    def __post_init__(self) -> None:
        named = (
            bool(self.node) and not (self.a or self.b) if self.kind == "crash" else bool(self.a and self.b) and not self.node
        )
        if not named or self.at_s < 0:
            raise ValueError(f"a {self.kind} names {'a node' if self.kind == 'crash' else 'a and b'}, and a time from 0 on")


class Scenario(_Part, frozen=True, kw_only=True):
    """See the module.

    Attributes:
        seed: of everything that is drawn.
        timeout_s: of virtual time: what runs then has failed.
        warm: links that sessions will use are dialled before time 0 (by one short session of each driver); else the first
            sessions find cold ones.
        heartbeat_s: of every link, which is dead after five of them; most frames of a large swarm are heartbeats.
        traces: a folder of recorded generations (``engine.replay_tokens``), beside the scenario's file or absolute.
    """

    model: Model
    nodes: tuple[Nodes, ...]
    drivers: tuple[Drivers, ...] = (Drivers(),)
    load: tuple[Load, ...]
    faults: tuple[Fault, ...] = ()
    name: str = "scenario"
    seed: int = 1
    timeout_s: float = 3600.0
    warm: bool = True
    heartbeat_s: float = 0.5
    traces: str = ""

    def __post_init__(self) -> None:
        if min(self.heartbeat_s, self.timeout_s) <= 0:
            raise ValueError("heartbeat_s and timeout_s are above 0")
        count = sum(len(group.ranges(self.model.layers)) for group in self.nodes) + sum(group.count for group in self.drivers)
        if count > MAX_MEMBERS:
            raise ValueError(f"{count} nodes and drivers are more than {MAX_MEMBERS}")
        known = {group.name for group in self.drivers}
        for load in self.load:
            if load.drivers not in known:
                raise ValueError(f"load {load.name!r} names drivers {load.drivers!r}, known are {sorted(known)}")
            if load.traces and not self.traces:
                raise ValueError(f"load {load.name!r} follows traces, and the scenario names none")


def read_scenario(path: Path) -> Scenario:
    """The scenario in a file. Raises ConfigError, naming file and key."""
    try:
        scenario = msgspec.convert(tomllib.loads(path.read_text("utf-8")), Scenario)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}", hint="name a scenario's TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {error}", hint="docs/scenarios has some to start from") from error
    except FarflungError as error:  # of values that are checked by what they stand for
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error
    if not scenario.traces:
        return scenario
    folder = path.parent / scenario.traces
    if not folder.is_dir():
        raise ConfigError(f"{path}: traces: {folder} is no folder", hint="name a folder of traces, beside the scenario's file")
    return msgspec.structs.replace(scenario, traces=str(folder))
