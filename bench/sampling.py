"""Time of sampling at the tail, one thread: ``python -m bench.sampling [--logits FILE.npy] [--rows N] [--vocab N] [--json]``.

Each line of the table is one kind of options over a batch of rows of logits: of a real model where ``--logits`` names a saved
float32 array [rows, vocab], else shaped like those. ``plain`` is the plain way in the same run (full sorts, noise for every
kept token, penalties over the whole vocabulary) and gives the same tokens; ``numpy`` is ours without the machine code.
Times are of the processor (``time.thread_time``), the best of some, so that what else runs here counts little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from farflung.core.sampling import SamplingOptions
from farflung.core.tree import TokenTree
from farflung.core.window import Commit, SlotRun, spans_of
from farflung.sampling import Counts, TokenHistory, log_probabilities, prepare, sample_rows
from farflung.sampling import noise as noise_module
from farflung.sampling.noise import gumbel, noise_key, noise_words

REPEAT = 9
CONTEXT = 4000  # tokens before each row
BIASES = tuple((token * 7, -5.0) for token in range(300))
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5}
OPTIONS = {
    "greedy": SamplingOptions(),
    "greedy, penalties": SamplingOptions(**PENALTIES),
    "T 0.7, top-p 0.95": SamplingOptions(temperature=0.7, top_p=0.95, seed=1),
    "T 1, top-p 0.95": SamplingOptions(temperature=1.0, top_p=0.95, seed=1),
    "T 1, top-k 50": SamplingOptions(temperature=1.0, top_k=50, seed=1),
    "T 1, min-p 0.05": SamplingOptions(temperature=1.0, min_p=0.05, seed=1),
    "T 0.7, top-k 50, top-p 0.95, min-p 0.05": SamplingOptions(temperature=0.7, top_k=50, top_p=0.95, min_p=0.05, seed=1),
    "T 0.7, top-p 0.95, penalties": SamplingOptions(temperature=0.7, top_p=0.95, seed=1, **PENALTIES),
    "T 0.7, top-p 0.95, 300 biases": SamplingOptions(temperature=0.7, top_p=0.95, seed=1, logit_bias=BIASES),
    "T 0.7, top-p 0.95, 5 logprobs": SamplingOptions(temperature=0.7, top_p=0.95, seed=1, logprobs=5),
    "T 1": SamplingOptions(temperature=1.0, seed=1),
    "T 1, penalties": SamplingOptions(temperature=1.0, seed=1, **PENALTIES),
    "T 2, top-p 0.95": SamplingOptions(temperature=2.0, top_p=0.95, seed=1),
    "T 100, top-p 0.9": SamplingOptions(temperature=100.0, top_p=0.9, seed=1),
}


def logits_like_a_model(rows: int, vocab: int) -> NDArray[np.float32]:
    """A body of normal values far below the greatest logit, and a head that falls with the logarithm of the rank.

    Qwen2.5-Coder-0.5B and Gemma-3-270m on prose: the body lies 15-25 below the greatest, with a deviation of 2.4-5.5; nearer to
    the greatest the number of tokens doubles with each unit of distance (17 within 6, 350 within 10). Some rows are surer.
    """
    rng = np.random.default_rng(0)
    found = rng.normal(-18.0, 2.6, (rows, vocab))
    head = min(5000, vocab // 2)
    depths = np.r_[0.0, 1.0 + 1.5 * np.log(np.arange(1, head))]
    for index, row in enumerate(found):
        row[rng.permutation(vocab)[:head]] = -depths - 1.5 * (index % 3) * (depths > 0)
    return found.astype(np.float32)


def history_of(rows: int, vocab: int) -> list[Counts]:
    """Counts of a text of ``CONTEXT`` tokens whose frequencies fall as Zipf's, half of it prompt, and of each row of a path
    after it."""
    history, length = TokenHistory(CONTEXT // 2), CONTEXT + rows
    text = (np.random.default_rng(0).zipf(1.3, length) % vocab).astype(np.int32)
    tree, _ = TokenTree().add([SlotRun(0, length, -1)])
    tree, _ = tree.commit(Commit(0, spans_of(range(CONTEXT))))
    history.advance(range(length), text, tree)
    return [history.counts(slot, slot) for slot in range(CONTEXT, length)]


def ours(logits: NDArray[np.float32], options: SamplingOptions, positions: range, counts: Sequence[Counts]) -> list[int]:
    tokens = sample_rows(logits, options, positions, counts)
    if options.logprobs is not None:
        log_probabilities(logits, tokens, options.logprobs)
    return tokens


def plainly(logits: NDArray[np.float32], options: SamplingOptions, positions: range, counts: Sequence[Counts]) -> list[int]:
    key, tokens = noise_key(options.seed, options.choice), []
    for raw, position, count in zip(logits, positions, counts, strict=True):
        row = penalised(raw, options, count)
        if options.greedy:
            tokens.append(int(row.argmax()))
            continue
        scaled = (row.astype(np.float64) - float(row.max())) / options.temperature
        order = np.argsort(-row, kind="stable") if options.top_k or options.top_p < 1.0 else np.arange(len(row))
        if options.top_k:
            order = order[: options.top_k]
        if options.top_p < 1.0:
            weights = np.exp(scaled[order])
            order = order[: int(np.searchsorted(np.cumsum(weights), options.top_p * weights.sum())) + 1]
        if options.min_p:
            order = order[np.exp(scaled[order]) >= options.min_p]
        kept = np.sort(order)
        scores = scaled[kept] + gumbel(noise_words(key, position, kept))
        tokens.append(int(kept[np.argmax(scores)]))
        if options.logprobs:
            every = row - row.max() - np.log(np.exp(row - row.max()).sum())
            np.sort(every)
    return tokens


def penalised(row: NDArray[np.float32], options: SamplingOptions, counts: Counts) -> NDArray[np.float32]:
    found = row.copy()
    for token, bias in options.logit_bias:
        found[token] += np.float32(bias)
    if options.needs_history:
        in_text, in_output = np.zeros(len(row), np.float32), np.zeros(len(row), np.float32)
        in_text[counts.ids], in_output[counts.ids] = counts.in_text, counts.in_output
        by = np.float32(options.repetition_penalty)
        found = np.where(in_text > 0, np.where(found > 0, found / by, found * by), found)
        found -= np.float32(options.frequency_penalty) * in_output
        found -= np.float32(options.presence_penalty) * (in_output > 0).astype(np.float32)
    return found


def best_ms(call: Callable[[], object], repeat: int = REPEAT) -> float:
    def once() -> float:
        start = time.thread_time()
        call()
        return time.thread_time() - start

    return 1e3 * min(once() for _ in range(repeat))


def measure(logits: NDArray[np.float32]) -> list[dict[str, object]]:
    rows, vocab = logits.shape
    positions, counts, found = range(rows), history_of(rows, vocab), []
    for name, options in OPTIONS.items():
        case = (logits, options, positions, counts)
        if ours(*case) != plainly(*case):
            raise SystemExit(f"{name}: the tokens differ from the plain way's")
        fast, plain = best_ms(lambda case=case: ours(*case)), best_ms(lambda case=case: plainly(*case), 2)
        with patch.object(noise_module, "words_kernel", lambda: None):
            bare = best_ms(lambda case=case: ours(*case))
        figures = {
            "ms": round(fast, 2),
            "numpy_ms": round(bare, 2),
            "plain_ms": round(plain, 2),
            "ratio": round(plain / fast, 1),
        }
        found.append({"options": name, **figures})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="rows of logits in one call")
    parser.add_argument("--vocab", type=int, default=152_064, help="logits in a row")
    parser.add_argument("--logits", type=Path, help="a .npy file of real ones")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logits = logits_like_a_model(args.rows, args.vocab) if args.logits is None else np.load(args.logits)[: args.rows]
    prepare(logits.shape[1])
    rows = measure(logits)
    if args.json:
        print(json.dumps({"rows": logits.shape[0], "vocab": logits.shape[1], "results": rows}))
        return
    print(
        f"{logits.shape[0]} rows of {logits.shape[1]} logits, {CONTEXT} tokens before them, best of {REPEAT}, ms of one thread"
    )
    print(f"{'options':42} {'ms':>8} {'numpy':>8} {'plain':>8} {'ratio':>6}")
    for row in rows:
        print(f"{row['options']:42} {row['ms']:8} {row['numpy_ms']:8} {row['plain_ms']:8} {row['ratio']:6}")


if __name__ == "__main__":
    main()
