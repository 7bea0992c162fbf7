from __future__ import annotations

import pytest
from command_lines import Farflung

from farflung.cli.sampling import logprobs_as_json, parse_logit_bias
from farflung.core.errors import UsageError
from farflung.core.sampling import TokenLogprob
from farflung.session import Token


def test_biases_are_read_as_id_and_number() -> None:
    assert parse_logit_bias(["5=-100", "17=2.5"]) == ((5, -100.0), (17, 2.5))


@pytest.mark.parametrize("pair", ["5", "=5", "a=5", "5=x", "-5=1", ""])
def test_what_is_no_bias_is_refused_with_an_example(pair: str) -> None:
    with pytest.raises(UsageError, match="ID=BIAS") as refused:
        parse_logit_bias([pair])
    assert "1234=-5" in refused.value.hint


def test_log_probabilities_read_as_objects_in_json() -> None:
    tokens = [Token(7, "a", TokenLogprob(-0.5, ((7, -0.5), (9, -1.5)))), Token(None, "held back")]
    top = [{"id": 7, "logprob": -0.5}, {"id": 9, "logprob": -1.5}]
    assert logprobs_as_json(tokens) == [{"id": 7, "logprob": -0.5, "top": top}]


@pytest.mark.parametrize(
    ("option", "says"),
    [("--logit-bias=5=1000", "between -100 and 100"), ("--logit-bias=five", "ID=BIAS"), ("--logprobs=21", "--logprobs")],
)
def test_a_sampling_option_out_of_range_ends_with_wrong_usage_before_anything_is_dialled(
    farflung: Farflung, option: str, says: str
) -> None:
    found = farflung("generate", "-m", "gemma3-270m", option, "hello")
    assert found.code == 2
    assert says in found.stderr
