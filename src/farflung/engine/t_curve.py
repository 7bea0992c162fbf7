"""Measures a backend's T-curve: how long a step takes as a function of the tokens in it.

A node measures it once at start and announces it; draft lengths, prompt chunks and routes are chosen from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from farflung.core.ids import SessionId
from farflung.core.sampling import SamplingOptions
from farflung.core.window import NO_SLOT, SlotRun
from farflung.engine.backend import SessionSpec, StageBackend, StageWork
from farflung.wire.codec import codec

T_POINTS = (1, 4, 16, 64, 256)
T_ALWAYS = frozenset({1, 16})
"""Measured whatever the budget: one point says nothing of how a step grows with its tokens."""
_SESSION = SessionId("0" * 32)  # drawn by no driver: ids are random
_TRIES = 5
_CODEC = "fp32"


async def measure_t_curve(
    backend: StageBackend, *, points: Sequence[int] = T_POINTS, budget_s: float = 0.5
) -> dict[int, float]:
    """Milliseconds of the fastest step of that many tokens, by number of tokens.

    Args:
        backend: with no session open that is in use.
        points: ascending; one that does not fit the free KV is left out, and one that by those before it does not fit the
            rest of the budget, unless it is the first or one of ``T_ALWAYS``.
        budget_s: time for all of it, on the loop's clock.

    Raises what the backend reports for a step.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + budget_s
    curve: dict[int, float] = {}
    for tokens in points:
        if tokens > backend.kv_free_tokens:
            break
        if curve and tokens not in T_ALWAYS:
            known = max(curve)
            if loop.time() + 2 * curve[known] / 1000 * tokens / known > deadline:  # a first step, cold, and one that counts
                continue
        taken = [await _step_s(backend, tokens)]
        for _ in range(_TRIES):
            if len(taken) > 1 and loop.time() + min(taken) > deadline:
                break
            taken.append(await _step_s(backend, tokens))
        curve[tokens] = min(taken) * 1000
    return curve


async def _step_s(backend: StageBackend, tokens: int) -> float:
    is_first, is_last = backend.layers.start == 0, backend.layers.stop == backend.spec.layers
    width = backend.spec.hidden_size
    work = StageWork(
        session=_SESSION,
        runs=(SlotRun(0, tokens, NO_SLOT),),
        token_ids=np.arange(tokens, dtype=np.int32) % backend.spec.vocab_size if is_first else None,
        rows=None if is_first else codec(_CODEC).encode(np.ones((tokens, width), np.float32)),
        want=(tokens - 1,) if is_last else (),
    )
    backend.open(SessionSpec(session=_SESSION, lease_tokens=tokens, sampling=SamplingOptions(), codec=_CODEC))
    try:
        report = await backend.step([work])
    finally:
        backend.close(_SESSION)
    if (error := report.results[0].error) is not None:
        raise error
    return report.compute_s
