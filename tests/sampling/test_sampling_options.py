from __future__ import annotations

import math

import msgspec
import pytest

from farflung.core.errors import UsageError
from farflung.core.sampling import SamplingOptions, TokenLogprob

FULL = SamplingOptions(
    temperature=0.7,
    top_k=50,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    logit_bias=((3, -100.0), (7, 2.5)),
    seed=3,
    choice=1,
    logprobs=5,
)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", [0.0, 100.0], [-0.1, 100.1, math.nan, math.inf]),
        ("top_k", [0, 1, 2**31 - 1], [-1, 2**31]),
        ("top_p", [1e-9, 1.0], [0.0, 1.1, -1.0, math.nan]),
        ("min_p", [0.0, 1.0], [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0.01, 1.0, 100.0], [0.0, -1.0, 101.0, math.nan, math.inf]),
        ("presence_penalty", [-2.0, 2.0], [-2.1, 2.1, math.nan]),
        ("frequency_penalty", [-2.0, 2.0], [-2.1, 2.1, math.nan]),
        ("logit_bias", [(), ((0, -100.0), (1, 100.0))], [((0, 101.0),), ((-1, 0.0),), ((2**31, 0.0),), ((5, math.nan),)]),
        ("seed", [0, 2**64 - 1], [-1, 2**64]),
        ("choice", [0, 2**32 - 1], [-1, 2**32]),
        ("logprobs", [None, 0, 20], [-1, 21]),
    ],
)
def test_an_option_out_of_range_is_refused_by_its_name(name: str, good: list[object], bad: list[object]) -> None:
    for value in good:
        assert getattr(SamplingOptions(**{name: value}), name) == value  # type: ignore[arg-type]
    for value in bad:
        with pytest.raises(UsageError, match=name):
            SamplingOptions(**{name: value})  # type: ignore[arg-type]


def test_biases_are_bounded_in_number_and_name_each_token_once() -> None:
    assert len(SamplingOptions(logit_bias=tuple((token, 1.0) for token in range(1024))).logit_bias) == 1024
    with pytest.raises(UsageError, match="1025 tokens"):
        SamplingOptions(logit_bias=tuple((token, 1.0) for token in range(1025)))
    with pytest.raises(UsageError, match="token 4 twice"):
        SamplingOptions(logit_bias=((4, 1.0), (4, 2.0)))


def test_options_and_log_probabilities_survive_the_wire() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(FULL), type=SamplingOptions) == FULL
    found = TokenLogprob(-0.5, ((3, -0.25), (9, -1.5)))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=TokenLogprob) == found


def test_only_penalties_need_the_history() -> None:
    assert not SamplingOptions(temperature=1.0, top_k=5, logit_bias=((1, 1.0),), logprobs=3).needs_history
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", -0.1), ("frequency_penalty", 0.1)):
        assert SamplingOptions(**{name: value}).needs_history
