"""Kernels of linear maps: right for every number of rows, packed one by one, shared where the input is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_config
from torch import nn

from farflung.core.model import LayerRange
from farflung.engine.kernel_plan import KernelPlan, kernel_plan
from farflung.engine.kernels import Int4, Int8, Int8Weights, Ladder, Packed, Plain
from farflung.engine.linear import KernelLinear, SharedLinear, swap_linears
from farflung.engine.quantise import GROUP, quantise_int4, quantise_int8
from farflung.engine.shared_inputs import shared_inputs

NO_BF16 = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(NO_BF16, reason="oneDNN has no bf16 kernels on this processor")


def weight_of(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((outputs, inputs), generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.floats(-3, 3), st.floats(-12, 12))
def test_a_quantised_weight_is_within_half_a_step_of_each_value(seed: int, mean: float, exponent: float) -> None:
    values = ((weight_of(6, 2 * GROUP, seed).float() + mean) * 2**exponent).bfloat16()
    eight = quantise_int8(values)
    assert bool(((eight.values() - values.float()).abs() <= eight.scales[:, None] * 0.5001).all())
    four = quantise_int4(values)
    groups = values.float().unflatten(1, (-1, GROUP))
    step = (groups.amax(2) - groups.amin(2)) / 15
    off = (four.values().unflatten(1, (-1, GROUP)) - groups).abs().amax(2)
    assert bool((off <= step * 1.5 + groups.abs().amax(2) * 2**-7).all())  # the fitted line gives up an outlier by a step


def test_weights_that_int4_can_express_come_back_as_they_were() -> None:
    codes = torch.arange(16).repeat(4, 4)  # every group has all codes
    values = ((codes - 8) * 0.5 + 2).bfloat16()
    assert torch.equal(quantise_int4(values).values(), values.float())
    assert torch.equal(quantise_int4(torch.full((2, 32), 0.25)).values(), torch.full((2, 32), 0.25))
    assert torch.equal(quantise_int8(torch.zeros(2, 8)).values(), torch.zeros(2, 8))


@pytest.mark.parametrize("bias", [None, weight_of(1, 512)[0]])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (1, 40), (1, 0)])
def test_every_kernel_multiplies_rows_of_any_shape(shape: tuple[int, int], bias: torch.Tensor | None) -> None:
    weight, rows = weight_of(512, 256), weight_of(shape[0] * shape[1], 256, 1).view(*shape, 256)
    int4 = quantise_int4(weight)
    few, many = Int4(int4, bias), Int8Weights(int4.values(), bias)
    cases = [
        (Plain(weight, bias), weight, 1e-2),
        (Int8Weights(weight, bias), weight, 2e-2),
        (few, int4.values(), 1e-2),
        (Ladder(few, many, 2), int4.values(), 2e-2),
    ]
    if not NO_BF16:
        cases.append((Packed(weight, bias), weight, 1e-2))
    if kernel_plan("int8").int8 is Int8:
        cases.append((Int8(weight, bias), weight, 2e-2))
    with torch.inference_mode():
        for kernel, values, most in cases:
            out = kernel(rows)
            expected = nn.functional.linear(rows.float(), values.float(), None if bias is None else bias.float())
            assert (out.shape, out.dtype) == ((*shape, 512), torch.bfloat16)
            assert shape[1] == 0 or error(out, expected) < most, type(kernel).__name__


def test_a_row_of_zeros_beside_a_large_one_is_zero_in_int8() -> None:
    kernel = Int8(weight_of(256, 256), None)
    rows = torch.stack([torch.zeros(256), torch.full((256,), 1e4)]).bfloat16()
    assert not bool(kernel(rows)[0].any())
    assert not bool(kernel(rows[:1]).any())


@needs_bf16
def test_packed_weights_multiply_bit_for_bit_like_plain_ones_and_leave_a_tied_embedding_alone() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 320, dtype=torch.bfloat16)
    embed = nn.Embedding(320, 256, dtype=torch.bfloat16)
    embed.weight = linear.weight
    rows = torch.randn((1, 5, 256), dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = linear(rows)
        head = swap_linears(linear, KernelPlan(packed=True), is_head=True)
        assert isinstance(head, KernelLinear)
        assert torch.equal(head(rows), expected)
        assert torch.equal(embed(torch.arange(320)), linear.weight)


def layer() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "q": nn.Linear(256, 512, dtype=torch.bfloat16),
            "k": nn.Linear(256, 256, bias=False, dtype=torch.bfloat16),
            "router": nn.Linear(256, 8, dtype=torch.bfloat16),
            "out": nn.Linear(512, 256, dtype=torch.bfloat16),
        }
    )


@pytest.mark.parametrize("quantised", [None, "int8", "int4"])
def test_maps_that_share_their_input_give_what_each_would_in_whatever_order_they_are_called(quantised: str | None) -> None:
    alone, joined = layer(), layer()
    plan = KernelPlan(quantised=quantised)  # type: ignore[arg-type]
    swap_linears(alone, plan)
    swap_linears(joined, plan, [("q", "k")])
    assert isinstance(joined["q"], SharedLinear)
    rows, others = torch.randn((1, 3, 256)).bfloat16(), torch.randn((1, 1, 256)).bfloat16()
    with torch.inference_mode():
        for names, given in (("qk", rows), ("kq", others), ("qq", rows), ("k", others), ("qk", rows)):
            for name in names:
                found = joined[name](given)
                assert found.is_contiguous()
                torch.testing.assert_close(found, alone[name](given))


def test_small_and_narrow_maps_stay_as_they_are_under_int4_and_a_head_is_int8() -> None:
    plan = KernelPlan(quantised="int4")
    assert isinstance(plan.kernel(weight_of(8, 256), None), Plain)
    assert isinstance(plan.kernel(weight_of(128, 1024), None), Plain)  # perhaps a router
    assert isinstance(plan.kernel(weight_of(512, 256), None), Int4)
    assert isinstance(plan.kernel(weight_of(512, 272), None), Int8Weights)  # no whole groups
    assert isinstance(plan.kernel(weight_of(512, 256), None, is_head=True), Int8Weights)
    assert isinstance(plan.kernel(weight_of(512, 256).float(), None), Plain)  # kept in fp32 by its family


def test_int4_weights_get_an_int8_copy_only_where_it_fits_the_budget() -> None:
    tight = kernel_plan("int4", weights=10**6, budget=10**6)
    assert tight.int4_rows is None
    assert tight.bytes_per_weight < 0.7
    roomy = kernel_plan("int4", weights=10**6, budget=2 * 10**6)
    assert roomy.bytes_per_weight <= 2.0


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("qwen2", {("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")}),
        ("gemma3_text", {("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")}),
        ("phi3", set()),  # fused by its family
    ],
)
def test_which_maps_share_their_input_is_seen_and_not_known(family: str, groups: set[tuple[str, ...]], tmp_path: Path) -> None:
    found = shared_inputs(tiny_config(family), LayerRange(2, 4))
    assert {index: set(names) for index, names in found.groups.items()} == {2: groups, 3: groups}
