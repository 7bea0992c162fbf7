"""A stage in each precision beside plain transformers and a stack of layers written by hand, in one run with the same threads.

    python -m bench.stage [--model qwen2.5-coder-0.5b] [--threads 2] [--rounds 5] [--llama-python PYTHON] [--json]

All sides take turns, and the least time of each counts: what else the machine does falls on all alike and is left out as far
as can be. So only the ratios mean something elsewhere. ``share of bandwidth``: bytes of weights read for a token, by its time,
of what this machine reads in a plain sum. ``overhead``: six layers of width 8, so that no arithmetic counts, beside a bare loop
over the same transformers layers with transformers' cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farflung.engine.torch_backend import TorchBackend

PROMPT, PREFILL, DECODE = 64, 512, 16
BATCH, BATCH_CONTEXT = 32, 256


class Least:
    """The least milliseconds of each (side, what)."""

    def __init__(self) -> None:
        self.ms: dict[tuple[str, str], float] = {}

    def note(self, side: str, what: str, seconds: float) -> None:
        key = side, what
        self.ms[key] = min(self.ms.get(key, float("inf")), seconds * 1e3)


class Ours:
    """Steps of a whole model in one backend."""

    def __init__(self, backend: TorchBackend, first: int = 0) -> None:
        """``first``: number of its first session."""
        from farflung.wire.codec import codec

        self._backend = backend
        self._is_first, self._is_last = backend.layers.start == 0, backend.layers.stop == backend.spec.layers
        self._row = codec("bf16").encode(_ones(backend.spec.hidden_size))
        self._first = first
        self._done: dict[int, int] = {}

    def open(self, count: int, tokens: int) -> None:
        from farflung.core.sampling import SamplingOptions
        from farflung.engine.backend import SessionSpec

        for number in range(self._first, self._first + count):
            spec = SessionSpec(session=_session(number), lease_tokens=tokens, sampling=SamplingOptions(), codec="bf16")
            self._backend.open(spec)
            self._done[number] = 0

    def close(self) -> None:
        for number in self._done:
            self._backend.close(_session(number))
        self._done.clear()

    async def step(self, sessions: int, rows: int) -> float:
        """Seconds of a step of so many tokens in each of the first ``sessions``."""
        import numpy as np

        from farflung.core.window import Commit, SlotRun, SlotSpan
        from farflung.engine.backend import StageWork

        work = []
        for number in list(self._done)[:sessions]:
            start = self._done[number]
            self._done[number] = start + rows
            work.append(
                StageWork(
                    session=_session(number),
                    runs=(SlotRun(start, rows, start - 1),),
                    commit=Commit(start, (SlotSpan(start, rows),)),
                    token_ids=np.arange(start, start + rows, dtype=np.int32) if self._is_first else None,
                    rows=None if self._is_first else self._row * rows,
                    want=(start + rows - 1,) if self._is_last else (),
                )
            )
        started = time.perf_counter()
        report = await self._backend.step(work)
        taken = time.perf_counter() - started
        for result in report.results:
            if result.error is not None:
                raise result.error
        return taken


def _session(number: int) -> Any:
    from farflung.core.ids import SessionId

    return SessionId(f"{number:032x}")


def _ones(width: int) -> Any:
    import numpy as np

    return np.ones((1, width), np.float32)


async def time_ours(name: str, ours: Ours, many: Ours, least: Least) -> None:
    """One turn of everything that is measured of a precision. ``many``: the sessions of the batch, their context filled."""
    lease = PREFILL + 64
    ours.open(1, lease)
    await ours.step(1, PROMPT)
    for _ in range(DECODE):
        least.note(name, "decode", await ours.step(1, 1))
    least.note(name, "16 tokens", await ours.step(1, 16))
    ours.close()
    ours.open(1, lease)
    least.note(name, "prefill 512", await ours.step(1, PREFILL))
    ours.close()
    for _ in range(3):
        least.note(name, "decode 32", await many.step(BATCH, 1))


def time_calls(name: str, call: Callable[[Any], Any], reset: Callable[[], None], least: Least) -> None:
    """The same of a function of token ids that remembers those before."""
    import torch

    def timed(rows: int) -> float:
        ids = torch.arange(rows)[None]
        started = time.perf_counter()
        call(ids)
        return time.perf_counter() - started

    with torch.inference_mode():
        reset()
        timed(PROMPT)
        for _ in range(DECODE):
            least.note(name, "decode", timed(1))
        least.note(name, "16 tokens", timed(16))
        reset()
        least.note(name, "prefill 512", timed(PREFILL))


class Plain:
    """The model's own forward with its cache, argmax included."""

    def __init__(self, stage: Any) -> None:
        self._model = stage.model
        self.reset()

    def reset(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)

    def __call__(self, ids: Any) -> Any:
        return self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)


class LlamaCpp:
    """``bench/llama_cpp_turns.py`` in an interpreter of its own, measuring when it is told to."""

    def __init__(self, python: str, model: Path, threads: int) -> None:
        script = Path(__file__).with_name("llama_cpp_turns.py")
        command = [python, str(script), str(model), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(self) -> dict[str, float]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise SystemExit("llama.cpp has no pipes")
        stdin.write("turn\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp ended with {self._process.wait()}")
        turn: dict[str, float] = json.loads(line)
        return turn

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def bandwidth() -> float:
    """Bytes a second of a sum over 256 MB."""
    import torch

    values = torch.ones(2**26)
    best = float("inf")
    for _ in range(7):
        started = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - started)
    return values.nbytes / best


async def overhead(rounds: int) -> dict[str, float]:
    """Microseconds of a step of six layers of width 8, and of a bare loop over them."""
    import torch
    from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

    from farflung.core.model import LayerRange
    from farflung.engine.loader import load_stage
    from farflung.engine.safetensors_source import SafetensorsSource
    from farflung.engine.torch_backend import BackendConfig, load_backend

    config = Qwen2Config(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=512,
    )
    layers = LayerRange(1, 7)
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        source = SafetensorsSource.of_folder(Path(folder), cache=Path(folder, "cache"))
        backend = load_backend(source, layers, torch.bfloat16, BackendConfig(kv_tokens=512, inline=True))
        stage = load_stage(source, layers, torch.bfloat16, attention=None)
    for module in stage.layers.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx -= layers.start
    least = Least()
    ours = Ours(backend)
    for _ in range(10 * rounds):
        ours.open(1, 128)
        await ours.step(1, PROMPT)
        for _ in range(DECODE):
            least.note("ours", "step", await ours.step(1, 1))
        ours.close()
        cache = DynamicCache(config=stage.base.config)
        with torch.inference_mode():
            start = 0
            for rows in (PROMPT, *[1] * DECODE):
                hidden = torch.ones(1, rows, 8, dtype=torch.bfloat16)
                started = time.perf_counter()
                positions = torch.arange(start, start + rows)[None]
                embeddings = stage.rotary[0](hidden, positions)
                for layer in stage.layers:
                    hidden = layer(hidden, position_embeddings=embeddings, position_ids=positions, past_key_values=cache)
                if rows == 1:
                    least.note("bare", "step", time.perf_counter() - started)
                start += rows
    await backend.aclose()
    step, bare = least.ms["ours", "step"] * 1e3, least.ms["bare", "step"] * 1e3
    return {"step_us": round(step), "bare_loop_us": round(bare), "ratio": round(step / bare, 2)}


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from bench.block_stack import BlockStack
    from farflung.engine.kernel_plan import BF16_BYTES, INT8_BYTES
    from farflung.engine.loader import load_stage
    from farflung.engine.open_model import open_source
    from farflung.engine.quantise import INT4_BYTES
    from farflung.engine.shared_inputs import shared_inputs
    from farflung.engine.torch_backend import BackendConfig, load_backend

    torch.set_num_threads(arguments.threads)
    llama = None
    if arguments.llama_python:
        llama = LlamaCpp(arguments.llama_python, open_source(arguments.model).path, arguments.threads)
    found: dict[str, Any] = {"model": arguments.model, "threads": arguments.threads}
    found["overhead"] = await overhead(arguments.rounds)
    source = open_source(arguments.model)
    layers = source.spec().all_layers
    backends: dict[str, TorchBackend] = {}
    for name, quantised in (("bf16", None), ("int8", "int8"), ("int4", "int4")):
        config = BackendConfig(
            kv_tokens=BATCH * (BATCH_CONTEXT + 3 * arguments.rounds) + PREFILL + 64,
            threads=arguments.threads,
            quantised=quantised,  # type: ignore[arg-type]
        )
        backends[name] = load_backend(source, layers, torch.bfloat16, config)
    stage = load_stage(source, layers, torch.bfloat16, attention="sdpa")
    stack, plain = BlockStack(stage, PREFILL + 64), Plain(stage)
    least = Least()
    batches = {name: Ours(backend, 1) for name, backend in backends.items()}
    for many in batches.values():
        many.open(BATCH, BATCH_CONTEXT + 3 * arguments.rounds)
        await many.step(BATCH, BATCH_CONTEXT)
    for _ in range(arguments.rounds):
        for name, backend in backends.items():
            await time_ours(name, Ours(backend), batches[name], least)
        if llama is not None:
            for what, ms in llama.turn().items():
                least.note("llama.cpp", what, ms / 1e3)
        time_calls("by hand", stack, stack.reset, least)
        time_calls("transformers", plain, plain.reset, least)
    head = stage.head.weight.numel()
    body = shared_inputs(source.config(), layers).weights - head
    weights = {"bf16": (body + head) * BF16_BYTES, "int8": (body + head) * INT8_BYTES, "int4": body * INT4_BYTES + head}
    rate = bandwidth()
    for backend in backends.values():
        await backend.aclose()
    found["ms"] = {f"{side}, {what}": round(ms, 2) for (side, what), ms in least.ms.items()}
    found["to_transformers"] = {
        f"{name}, {what}": round(least.ms["transformers", what] / least.ms[name, what], 2)
        for name in backends
        for what in ("decode", "16 tokens", "prefill 512")
    }
    by_hand = least.ms["by hand", "decode"]
    found["decode_to_by_hand"] = {name: round(by_hand / least.ms[name, "decode"], 2) for name in backends}
    found["16_tokens_to_one"] = {
        name: round(least.ms[name, "16 tokens"] / least.ms[name, "decode"], 2)
        for name in (*backends, "by hand", "transformers")
    }
    if llama is not None:
        llama.close()
        found["to_llama_cpp"] = {
            f"{name}, {what}": round(least.ms["llama.cpp", what] / least.ms[name, what], 2)
            for name in backends
            for what in ("decode", "16 tokens", "prefill 512", "decode 32")
        }
    found["bandwidth_gb_s"] = round(rate / 1e9, 1)
    found["share_of_bandwidth"] = {
        name: round(count / rate * 1e3 / least.ms[name, "decode"], 2) for name, count in weights.items()
    }
    found["batch_32_tokens_per_s"] = {name: round(BATCH * 1e3 / least.ms[name, "decode 32"], 1) for name in backends}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--llama-python",
        default="",
        metavar="PYTHON",
        help="an interpreter that has llama-cpp-python, to compare with (GGUF models)",
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
    found = asyncio.run(measure(arguments))
    if arguments.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        if isinstance(value, dict):
            print(key)
            for name, number in value.items():
                print(f"  {name:<28}{number}")
        else:
            print(f"{key:<30}{value}")


if __name__ == "__main__":
    main()
