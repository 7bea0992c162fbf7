"""Sixteen families in three stages compute what the whole model computes; what cannot be split is refused with its reason."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_ring import CASES, A, B, Reference, Ring, errors_of, path_work, text
from tiny_configs import CONTEXT, LAYERS, any_tiny_config

from farflung.core.errors import SessionRefused, UnsupportedModel
from farflung.engine.masks import MaskRule, Reach
from farflung.engine.safetensors_source import SafetensorsSource

TOLERANCE = 1e-5
FAMILIES = (
    "cohere2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_oss", "llama", "mistral", "mixtral", "olmo2",
    "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.05 * index for index in range(16)],
    "long_factor": [2.0 + 0.5 * index for index in range(16)],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 1.0,
    "factor": 8.0,
}


def saved(family: str, folder: Path, **changes: Any) -> Any:
    """A random model under ``folder``, as plain transformers computes it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(any_tiny_config(family, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.08)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.add_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(folder)
    return model


def logits_of(model: Any, context: int = 0) -> Reference:
    """``context``: the text is padded to so many tokens, by which transformers chooses rotary factors."""

    def whole(ids: torch.Tensor) -> torch.Tensor:
        padding = torch.full((max(0, context - len(ids)),), 3)
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=torch.cat([ids, padding])[None], use_cache=False).logits[0, : len(ids)]
        return logits

    return whole


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_chunks_packed_sessions_and_trees_of_a_family_equal_the_whole_model(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path)
    errors = errors_of(Ring.of_folder(tmp_path, LAYERS), logits_of(model))
    assert errors.keys() == CASES.keys()
    assert max(errors.values()) < TOLERANCE, errors


def test_rotary_factors_stay_as_prompt_and_max_tokens_chose_them_whoever_shares_the_pass(tmp_path: Path) -> None:
    model = saved("phi3", tmp_path, rope_parameters=LONGROPE, original_max_position_embeddings=64)
    long, short = text(80, seed=1), text(40, seed=2)

    async def body(ring: Ring) -> None:
        ring.open(A, lease=130, context=100)
        ring.open(B, lease=130, context=45)
        await ring.step(path_work(A, long, 0, 20))
        await ring.step(path_work(A, long, 20, 60), path_work(B, short, 0, 30))
        for step in range(10):
            await ring.step(path_work(B, short, 30 + step, 31 + step), path_work(A, long, 60 + step, 61 + step))
        await ring.step(path_work(A, long, 70, 80))
        long_logits, short_logits = logits_of(_afresh(model), 100)(long), logits_of(_afresh(model), 45)(short)
        assert ring.error(A, range(80), long_logits) < TOLERANCE
        assert ring.error(B, range(40), short_logits) < TOLERANCE
        other = logits_of(_afresh(model), 45)(long[:45])
        assert ((other - long_logits[:45]).abs().max() / other.abs().max()).item() > 0.01  # or nothing was tried here
        for stage in ring.stages:
            await stage.aclose()

    asyncio.run(body(Ring.of_folder(tmp_path, LAYERS)))


def _afresh(model: Any) -> Any:
    """The same model, which has not seen a long text yet: transformers remembers it."""
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def test_experts_stored_one_by_one_become_the_fused_tensors_of_this_stages_layers_only(tmp_path: Path) -> None:
    model = saved("qwen3_moe", tmp_path)
    source = SafetensorsSource.of_folder(tmp_path)
    fused = dict(model.named_parameters())
    stored = source.tensors(model, {"model.layers.2.mlp.experts.gate_up_proj"})
    (assembled,) = stored.values()
    names = {part.name for leaf in [assembled] for part in leaf.parts}
    assert len(names) == 16
    assert all(re.fullmatch(r"model\.layers\.2\.mlp\.experts\.\d\.(gate|up)_proj\.weight", name) for name in names)
    assert torch.equal(source.read(assembled), fused["model.layers.2.mlp.experts.gate_up_proj"])


def test_a_session_longer_than_chunked_attention_is_refused_and_one_as_long_is_exact(tmp_path: Path) -> None:
    model = saved("llama4_text", tmp_path, attention_chunk_size=64, attn_scale=0.5, floor_scale=8)
    ring = Ring.of_folder(tmp_path, LAYERS)
    with pytest.raises(SessionRefused, match="up to 64 tokens, not 65"):
        ring.open(A, lease=65)
    ids = text(64, seed=1)

    async def body() -> None:
        ring.open(A, lease=64)
        for start, stop in ((0, 10), (10, 50), *((at, at + 1) for at in range(50, 64))):
            await ring.step(path_work(A, ids, start, stop))
        assert ring.error(A, range(64), logits_of(model)(ids)) < TOLERANCE
        for stage in ring.stages:
            await stage.aclose()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("visible", "reach"),
    [
        (lambda _, __, q, k: k <= q, Reach()),
        (lambda _, __, q, k: (k <= q) & (k > q - 4096), Reach(window=4096)),
        (lambda _, __, q, k: (k <= q) & (k // 8192 == q // 8192), Reach(limit=8192)),
    ],
    ids=["causal", "sliding", "chunked"],
)
def test_what_a_mask_shows_is_found_out_however_wide_it_is(visible: Any, reach: Reach) -> None:
    assert MaskRule(visible).reach(2**17) == reach


@pytest.mark.parametrize(
    "visible",
    [lambda _, __, q, k: q >= 0, lambda _, __, q, k: (k <= q) & ((k > q - 100) | (k < 4)), lambda _, __, q, k: (q - k) % 7 < 3],
    ids=["both-ways", "with-sinks", "striped"],
)
def test_a_mask_of_another_kind_is_refused(visible: Any) -> None:
    with pytest.raises(UnsupportedModel, match="neither causal nor a sliding window"):
        MaskRule(visible).reach(2**17)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_next", "keep state from token to token"),
        ("gemma4_text", "embed_tokens_per_layer"),
        ("nanochat", "more between layers and head"),
        ("deepseek_v32", "work on the attention mask themselves"),
        ("mamba", "no longest text"),
        ("gpt_neo", "attention classes of its own"),
        ("diffllama", "attends more than once"),
    ],
)
def test_a_family_that_the_page_calls_refused_is_refused_with_the_reason_of_the_page(
    family: str, reason: str, tmp_path: Path
) -> None:
    (row,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {family} |")]
    assert "| refused |" in row
    saved(family, tmp_path)
    with pytest.raises(UnsupportedModel, match=re.escape(reason)) as refused:
        Ring.of_folder(tmp_path, any_tiny_config(family).num_hidden_layers)
    assert family in refused.value.message
    assert reason in row


def test_the_page_calls_nothing_failing_and_all_that_is_tried_here_right() -> None:
    rows = [
        line.split(" | ") for line in PAGE.read_text().splitlines() if re.match(r"\| [\w-]+ \| (right|refused|failing)", line)
    ]
    verdict = {row[0].removeprefix("| "): row[1] for row in rows}
    assert "failing" not in verdict.values()
    assert {family: verdict[family] for family in FAMILIES} == dict.fromkeys(FAMILIES, "right")
    assert sum(found == "right" for found in verdict.values()) >= 70
    assert CONTEXT > 60
