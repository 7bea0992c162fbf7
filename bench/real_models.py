"""Real weights in three stages against the whole model as plain transformers loads and computes it, fp32.

    python -m bench.real_models [--models gemma3-270m,qwen2.5-coder-0.5b,qwen2.5-coder-1.5b] [--json]

Models of the built-in list that are not here are said to be missing (``farflung models fetch NAME`` brings them). A prompt in
chunks and tokens one by one; the figure is the largest difference of a logit as a share of the largest. Target: <= 1e-5.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from farflung.cli.demo_reference import load_plainly
from farflung.core.ids import SessionId
from farflung.core.model import LayerRange
from farflung.core.sampling import SamplingOptions
from farflung.core.window import Commit, SlotRun, spans_of
from farflung.engine.backend import SessionSpec, StageWork
from farflung.engine.catalog import CATALOG, is_assembled, model_path
from farflung.engine.gguf_source import GgufSource
from farflung.engine.torch_backend import BackendConfig, TorchBackend, load_backend

SESSION = SessionId("a" * 32)
CHUNKS = (20, 9, 1, *[1] * 10)
TARGET = 1e-5


def whole_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary]; the model is gone afterwards, so that two never stand in memory."""
    model = load_plainly(str(path))
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


async def split_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """The same from three stages, each loaded and held only while its rows are computed."""
    source = GgufSource(path)
    count = source.spec().layers
    cuts = (0, count // 3, 2 * count // 3, count)
    found: list[torch.Tensor] = []
    config = BackendConfig(kv_tokens=64, on_logits=lambda _, __, logits: found.append(logits.clone()))
    rows: list[Any] = [None] * len(CHUNKS)
    for start, stop in pairwise(cuts):
        stage = load_backend(source, LayerRange(start, stop), torch.float32, config)
        stage.open(SessionSpec(session=SESSION, lease_tokens=64, sampling=SamplingOptions(), codec="fp32"))
        rows = [await _step(stage, ids, index, coded) for index, coded in enumerate(rows)]
        await stage.aclose()
    return torch.cat(found)


async def _step(stage: TorchBackend, ids: torch.Tensor, index: int, rows: Any) -> Any:
    start = sum(CHUNKS[:index])
    stop = start + CHUNKS[index]
    work = StageWork(
        session=SESSION,
        runs=(SlotRun(start, stop - start, start - 1),),
        commit=Commit(start, spans_of(range(start, stop))),
        token_ids=ids[start:stop].numpy().astype(np.int32) if stage.layers.start == 0 else None,
        rows=rows,
        want=tuple(range(start, stop)) if stage.layers.stop == stage.spec.layers else (),
    )
    (result,) = (await stage.step([work])).results
    if result.error is not None:
        raise result.error
    return None if result.rows is None else bytes(result.rows)


def error_of(path: Path) -> float:
    """Largest relative error of a GGUF file split in three."""
    ids = torch.randint(100, 20_000, (sum(CHUNKS),), generator=torch.Generator().manual_seed(0))
    reference = whole_logits(path, ids)
    return ((asyncio.run(split_logits(path, ids)) - reference).abs().max() / reference.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CATALOG))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, float | None] = {}
    for name in arguments.models.split(","):
        entry = CATALOG[name]
        found[name] = error_of(model_path(entry)) if is_assembled(entry) else None
        if not arguments.json:
            error = found[name]
            print(f"{name}: {'missing: farflung models fetch ' + name if error is None else f'{error:.2e}'}", flush=True)
    if arguments.json:
        print(json.dumps({"target": TARGET, "errors": found}))
    sys.exit(any(error is not None and error > TARGET for error in found.values()))


if __name__ == "__main__":
    main()
