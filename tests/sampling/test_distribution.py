"""Tokens come as often as the options say: 20,000 samples of a tiny model's distribution against exact probabilities.

Every case also names options that are a little off; the same samples must not fit those, so the test can fail.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_model
from numpy.typing import NDArray
from plain_sampling import probabilities, recount

from farflung.core.ids import SessionId
from farflung.core.model import LayerRange
from farflung.core.sampling import SamplingOptions
from farflung.core.window import Commit, SlotRun, spans_of
from farflung.engine.backend import SessionSpec, StageWork
from farflung.engine.safetensors_source import SafetensorsSource
from farflung.engine.torch_backend import BackendConfig, load_backend
from farflung.sampling import sample_rows

SAMPLES = 20_000
PROMPT, OUTPUT = [0, 3, 3, 7, 200], [1, 3, 4, 4, 4, 6, 100]
LIKELY = 0.002  # rarer tokens are counted together

_ALL = {"temperature": 0.9, "top_k": 60, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "presence_penalty": 0.4}
_BIAS = ((9, 2.0), (2, -100.0))
Options = dict[str, object]
CASES: list[tuple[Options, list[Options]]] = [
    (
        {"temperature": 0.7, "logit_bias": _BIAS},
        [{"temperature": 0.75, "logit_bias": _BIAS}, {"temperature": 0.7, "logit_bias": ((9, 1.8), (2, -100.0))}],
    ),
    ({"top_k": 8}, [{"top_k": 9}]),
    ({"top_p": 0.7}, [{"top_p": 0.72}]),
    ({"min_p": 0.2}, [{"min_p": 0.15}]),
    ({"repetition_penalty": 1.3}, [{"repetition_penalty": 1.0}]),
    (
        {"presence_penalty": -1.5, "frequency_penalty": -0.8},
        [{"presence_penalty": -1.3, "frequency_penalty": -0.8}, {"presence_penalty": -1.5, "frequency_penalty": -0.7}],
    ),
    ({**_ALL, "frequency_penalty": -0.6, "logit_bias": ((6, 1.0),)}, [{**_ALL, "frequency_penalty": -0.6}]),
]
MORE: list[tuple[Options, list[Options]]] = [
    ({"temperature": 1.5}, [{"temperature": 1.4}]),
    ({"repetition_penalty": 0.7}, [{"repetition_penalty": 0.8}]),
    ({"top_k": 30, "top_p": 0.8}, [{"top_k": 60, "top_p": 0.8}]),
    ({"top_k": 30, "top_p": 0.9, "min_p": 0.1}, [{"top_k": 30, "top_p": 0.9, "min_p": 0.2}]),
]
"""Beside one case for each option and one of all."""


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    """Logits float32 [320] of a tiny model, spread as those of a trained one; the likeliest token is renamed 0, and so on."""
    folder: Path = tiny_model("qwen2", tmp_path_factory.mktemp("qwen2"))
    source, seen = SafetensorsSource.of_folder(folder), []
    session, text = SessionId("a" * 32), [5, 9, 14, 200]

    async def body() -> None:
        config = BackendConfig(
            kv_tokens=16, inline=True, on_logits=lambda _session, _slots, logits: seen.append(logits.clone())
        )
        backend = load_backend(source, LayerRange(0, source.spec().layers), torch.float32, config)
        backend.open(SessionSpec(session=session, lease_tokens=16, sampling=SamplingOptions(), codec="fp32"))
        runs, count = (SlotRun(0, len(text), -1),), len(text)
        work = StageWork(
            session=session,
            runs=runs,
            commit=Commit(0, spans_of(range(count))),
            token_ids=np.array(text, np.int32),
            want=(count - 1,),
        )
        await backend.step([work])

    asyncio.run(body())
    logits = np.sort(seen[0][0].numpy())[::-1]
    return ((logits - logits.mean()) * (1.5 / logits.std())).astype(np.float32)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
    ids=[" ".join(right) for right, _ in (*CASES, *MORE)],
)
def test_samples_fit_the_exact_probabilities_and_not_those_of_other_options(
    row: NDArray[np.float32], right: Options, wrong: list[Options]
) -> None:
    options = SamplingOptions(**{"temperature": 1.0, "seed": 11, **right})  # type: ignore[arg-type]
    rows = np.broadcast_to(row, (SAMPLES, len(row)))
    counts = [recount(PROMPT, OUTPUT)] * SAMPLES
    tokens = sample_rows(rows, options, range(SAMPLES), counts)
    assert fits(tokens, probabilities(row, options, PROMPT, OUTPUT))
    for changed in wrong:
        other = SamplingOptions(**{"temperature": 1.0, **changed})  # type: ignore[arg-type]
        assert not fits(tokens, probabilities(row, other, PROMPT, OUTPUT))


def fits(tokens: list[int], expected: NDArray[np.float64]) -> bool:
    """Pearson's test; an honest sampler fails once in 10,000 times."""
    counts = np.bincount(tokens, minlength=len(expected))
    if counts[expected == 0.0].sum():
        return False
    alone = expected >= LIKELY
    seen = np.append(counts[alone], counts[~alone].sum())
    wanted = np.append(expected[alone], expected[~alone].sum()) * len(tokens)
    seen, wanted = seen[wanted > 0.0], wanted[wanted > 0.0]
    freedom = len(seen) - 1
    # Wilson and Hilferty's quantile of the chi-square distribution, 3.719 being that of the normal one.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    return bool(((seen - wanted) ** 2 / wanted).sum() < limit)
