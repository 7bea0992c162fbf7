"""The llama.cpp side of ``bench.stage``, in a process of its own: torch and llama.cpp in one end with SIGILL.

Run by an interpreter that has ``llama-cpp-python``: ``python llama_cpp_turns.py FILE.gguf THREADS``. For each line on stdin it
measures one turn and answers with a line of JSON: milliseconds by name, the least of the turn.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp as api

PROMPT, PREFILL, DECODE = 64, 512, 16
BATCH, BATCH_CONTEXT = 32, 256


class Context:
    """A context with several sequences, each as long as it has been told."""

    def __init__(self, model: Any, threads: int, sequences: int, tokens: int) -> None:
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = sequences * tokens, sequences
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        self._context = api.llama_init_from_model(model, settings)
        self._batch = api.llama_batch_init(512, 0, 1)
        self._past = [0] * sequences

    def clear(self) -> None:
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        self._past = [0] * len(self._past)

    def share_first(self) -> None:
        """Gives every sequence the tokens of the first."""
        memory = api.llama_get_memory(self._context)
        for sequence in range(1, len(self._past)):
            api.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
            self._past[sequence] = self._past[0]

    def step(self, sequences: range, rows: int) -> float:
        """Milliseconds of one step of so many tokens in each of some sequences; the last of each wants logits."""
        batch, count = self._batch, 0
        for sequence in sequences:
            for row in range(rows):
                batch.token[count] = 100 + self._past[sequence] + row
                batch.pos[count] = self._past[sequence] + row
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = sequence
                batch.logits[count] = row == rows - 1
                count += 1
            self._past[sequence] += rows
        batch.n_tokens = count
        started = time.perf_counter()
        code = api.llama_decode(self._context, batch)
        taken = (time.perf_counter() - started) * 1e3
        if code:
            raise SystemExit(f"llama_decode returned {code}")
        return taken


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    one, many = Context(model, threads, 1, PREFILL + 64), Context(model, threads, BATCH, BATCH_CONTEXT + 16)
    only, each = range(1), range(BATCH)
    for _ in sys.stdin:
        found: dict[str, float] = {}
        one.clear()
        one.step(only, PROMPT)
        found["decode"] = min(one.step(only, 1) for _ in range(DECODE))
        found["16 tokens"] = one.step(only, 16)
        one.clear()
        found["prefill 512"] = one.step(only, PREFILL)
        many.clear()
        many.step(only, BATCH_CONTEXT)
        many.share_first()
        found["decode 32"] = min(many.step(each, 1) for _ in range(3))
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
