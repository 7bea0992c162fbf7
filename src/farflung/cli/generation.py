"""One generation as a person or a script sees it: streamed text, figures while it runs, a summary after it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from farflung.cli.live import LiveText
from farflung.cli.output import Output
from farflung.cli.sampling import logprobs_as_json
from farflung.core.ids import short
from farflung.core.units import Bytes

if TYPE_CHECKING:
    from rich.table import Table

    from farflung.session import Generation, GenerationStats, Token


async def stream(out: Output, generation: Generation, prompt: str = "") -> list[Token]:
    """Shows ``generation`` as it comes, after ``prompt``: with a live line of speed on a terminal, as bare text elsewhere.

    Returns what came.
    """
    found: list[Token] = []
    async with aclosing(aiter(generation)) as tokens:  # leaving early, by Ctrl-C say, cancels it at every stage
        if not out.live:
            out.write(prompt)
            async for token in tokens:
                out.write(token.text)
                found.append(token)
            out.write("\n")
            return found
        live = LiveText(sys.stdout.write, sys.stdout.flush)
        try:
            live.write(prompt, "reading the prompt")
            async for token in tokens:
                live.write(token.text, _speed_line(generation.stats))
                found.append(token)
        finally:
            live.close()
    return found


def as_json(generation: Generation, tokens: Sequence[Token] = ()) -> dict[str, object]:
    """The keys that scripts rely on; ``logprobs`` too where ``tokens`` came with them."""
    stats = generation.stats
    logprobs = logprobs_as_json(tokens)
    hops = stats.route.hops if stats.route is not None else ()
    return {
        "text": stats.text,
        "token_ids": list(stats.token_ids),
        "finish_reason": generation.finish_reason,
        "route": [{"id": hop.node_id, "layers": [hop.layers.start, hop.layers.stop]} for hop in hops],
        "prompt_tokens": stats.prompt_tokens,
        "decode_tokens_per_s": round(stats.decode_tokens_per_s, 3),
        "ttft_s": _rounded(stats.ttft_s),
        "inter_token_ms": {key: round(value, 3) for key, value in stats.inter_token_ms().items()},
        "bytes_per_token": {key: round(value, 1) for key, value in stats.bytes_per_token().items()},
        "rounds": stats.rounds,
        "accepted_per_round": 1.0,  # plain decode: every window asks for one token and gets it
        "repairs": [],
        **({"logprobs": logprobs} if logprobs else {}),
    }


def summary(stats: GenerationStats) -> Table:
    """The table at the end: each stage's time and bytes per token, then the whole ring."""
    from rich.table import Table

    table = Table("stage", "layers", box=None, pad_edge=False)
    for title in ("ms/token", "bytes/token", "prompt ms"):
        table.add_column(title, justify="right")
    for stage in stats.stages:
        figures = (f"{stage.decode_ms:.2f}", f"{stage.decode_bytes:,.0f}", f"{stage.prefill_ms:.1f}")
        table.add_row(short(stage.node_id), str(stage.layers), *figures)
    if stats.decode_tokens_per_s and stats.stages:
        ring_ms = 1e3 / stats.decode_tokens_per_s  # a mean, as the stages' times are
        between_ms = max(ring_ms - sum(stage.decode_ms for stage in stats.stages), 0.0)
        table.add_row("links and waiting", "", f"{between_ms:.2f}")
        table.add_row("ring", "", f"{ring_ms:.2f}", f"{stats.bytes_per_token()['total']:,.0f}")
    return table


def headline(stats: GenerationStats) -> str:
    """Tokens, speed and the wait for the first one, in a sentence."""
    parts = [f"{len(stats.token_ids)} tokens after a prompt of {stats.prompt_tokens}"]
    if stats.decode_tokens_per_s:
        parts.append(f"{stats.decode_tokens_per_s:.1f} tokens/s")
    if stats.ttft_s is not None:
        parts.append(f"first token after {stats.ttft_s:.2f} s")
    parts.append(f"driver sent {Bytes(stats.bytes_sent)} and received {Bytes(stats.bytes_received)}")
    return ", ".join(parts)


def read_prompt(prompt: str) -> str:
    """The prompt, or what stands on stdin where it is ``-``."""
    return sys.stdin.read() if prompt == "-" else prompt


def _speed_line(stats: GenerationStats) -> str:
    parts = [f"{len(stats.token_ids)} tokens"]
    if stats.decode_tokens_per_s:
        parts.append(f"{stats.decode_tokens_per_s:.1f} tokens/s")
    if stats.ttft_s is not None:
        parts.append(f"first after {stats.ttft_s:.2f} s")
    return " · ".join(parts)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
