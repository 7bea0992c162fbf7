"""What rounding weights costs a real model: perplexity on a fixed text, beside bf16, through the backend itself."""

from __future__ import annotations

import asyncio
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from farflung.core.ids import SessionId
from farflung.core.sampling import SamplingOptions
from farflung.core.window import SlotRun
from farflung.engine.backend import SessionSpec, StageWork
from farflung.engine.kernel_plan import Quantised
from farflung.engine.open_model import open_source
from farflung.engine.torch_backend import BackendConfig, load_backend
from farflung.text.tokenizer import Tokenizer

TEXT = Path(__file__).with_name("quality_text.txt")
MODEL = "qwen2.5-coder-0.5b"
SESSION = SessionId("7" * 32)


class Reader:
    """Loads the model in a precision and reads the text: perplexity, and the likeliest token after each position."""

    def __init__(self) -> None:
        self._source = open_source(MODEL)
        self._ids = np.array(Tokenizer(*self._source.tokenizer_arguments()).encode(TEXT.read_text()), np.int32)

    def read(self, quantised: Quantised | None, weight_bytes: int | None = None) -> tuple[float, Any]:
        found: dict[int, torch.Tensor] = {}

        def keep(_: SessionId, slots: tuple[int, ...], logits: torch.Tensor) -> None:
            for slot, row in zip(slots, logits, strict=True):
                loss = 0.0 if slot + 1 == len(self._ids) else float(row.logsumexp(0) - row[int(self._ids[slot + 1])])
                found[slot] = torch.tensor([loss, float(row.argmax())])

        count = len(self._ids)
        config = BackendConfig(kv_tokens=count, quantised=quantised, weight_bytes=weight_bytes, on_logits=keep)
        backend = load_backend(self._source, self._source.spec().all_layers, torch.bfloat16, config)
        backend.open(SessionSpec(session=SESSION, lease_tokens=count, sampling=SamplingOptions(), codec="bf16"))
        work = StageWork(session=SESSION, runs=(SlotRun(0, count, -1),), token_ids=self._ids, want=tuple(range(count)))

        async def step() -> None:
            result = (await backend.step([work])).results[0]
            await backend.aclose()
            if result.error is not None:
                raise result.error

        asyncio.run(step())
        rows = torch.stack([found[slot] for slot in range(count)])
        return math.exp(float(rows[:-1, 0].mean())), rows[:, 1]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif("FARFLUNG_REAL_WEIGHTS" not in os.environ, reason="fetches Qwen2.5-Coder-0.5B: set FARFLUNG_REAL_WEIGHTS=1")
def test_int8_costs_at_most_one_and_int4_four_percent_of_perplexity(record_property: Any) -> None:
    reader = Reader()
    plain, likeliest = reader.read(None)
    cases: list[tuple[str, Quantised, int | None, float]] = [
        ("int8", "int8", None, 1.01),
        ("int4", "int4", None, 1.04),
        ("int4 in little memory", "int4", 0, 1.04),
    ]
    for name, quantised, weight_bytes, most in cases:
        found, tokens = reader.read(quantised, weight_bytes)
        agreement = float((tokens == likeliest).float().mean())
        record_property(name, f"perplexity {found / plain - 1:+.2%}, greedy agreement {agreement:.1%}")
        print(f"{name}: perplexity {found:.3f} beside {plain:.3f} ({found / plain - 1:+.2%}), greedy agreement {agreement:.1%}")
        assert found <= most * plain, name
        assert agreement > 0.85, name
