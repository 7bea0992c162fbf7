"""Sampling at the tail of a split model: every branch of a tree is sampled as if it were the only text."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from models import tiny_model

from farflung.core.errors import MalformedFrame, SessionRefused
from farflung.core.ids import SessionId
from farflung.core.model import LayerRange
from farflung.core.sampling import SamplingOptions
from farflung.core.window import Commit, SlotRun, spans_of
from farflung.engine.backend import SessionSpec, StageResult, StageWork
from farflung.engine.safetensors_source import SafetensorsSource
from farflung.engine.torch_backend import BackendConfig, TorchBackend, load_backend

TREE, ALONE = SessionId("a" * 32), SessionId("b" * 32)
PROMPT = [5, 6, 7, 5]
# Slot -> (parent, token id), after the prompt's slots 0 to 3. Slots 4-6 and 7-9 are branches, 10 hangs under 5.
BRANCHES = {4: (3, 30), 5: (4, 31), 6: (5, 30), 7: (3, 31), 8: (7, 31), 9: (8, 31), 10: (5, 7)}
PENALISED = SamplingOptions(
    temperature=1.0, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=1.5, seed=3, logprobs=2
)


class Split:
    """A model in two stages; the tail is told the token ids."""

    def __init__(self, source: SafetensorsSource) -> None:
        layers = source.spec().layers
        config = BackendConfig(kv_tokens=80, inline=True)
        self.stages: list[TorchBackend] = [
            load_backend(source, LayerRange(0, 2), torch.float32, config),
            load_backend(source, LayerRange(2, layers), torch.float32, config),
        ]

    def open(self, session: SessionId, sampling: SamplingOptions = PENALISED) -> None:
        for stage in self.stages:
            spec = SessionSpec(session=session, lease_tokens=40, sampling=sampling, codec="fp32", prompt_tokens=len(PROMPT))
            stage.open(spec)

    def step(
        self, session: SessionId, runs: list[SlotRun], ids: list[int], want: list[int], commit: Commit | None = None
    ) -> StageResult:
        work = StageWork(session=session, runs=tuple(runs), commit=commit, token_ids=np.array(ids, np.int32), want=tuple(want))

        async def body() -> StageResult:
            (first,) = (await self.stages[0].step([work])).results
            tail = StageWork(
                session=session, runs=work.runs, commit=commit, token_ids=work.token_ids, rows=first.rows, want=work.want
            )
            (last,) = (await self.stages[1].step([tail])).results
            return last

        result = asyncio.run(body())
        assert result.error is None
        return result

    def prompt(self, session: SessionId) -> StageResult:
        count = len(PROMPT)
        return self.step(session, [SlotRun(0, count, -1)], PROMPT, [count - 1], Commit(0, spans_of(range(count))))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsSource:
    return SafetensorsSource.of_folder(tiny_model("qwen2", tmp_path_factory.mktemp("qwen2")))


def path_to(slot: int) -> list[int]:
    """Token ids from the prompt's end to ``slot``."""
    found: list[int] = []
    while slot in BRANCHES:
        slot, token = BRANCHES[slot]
        found.insert(0, token)
    return found


def alone(source: SafetensorsSource, ids: list[int]) -> StageResult:
    """The answer after ``ids``, one by one on a session of their own."""
    split = Split(source)
    split.open(ALONE)
    split.prompt(ALONE)
    result = None
    for slot, token in enumerate(ids, start=len(PROMPT)):
        result = split.step(ALONE, [SlotRun(slot, 1, slot - 1)], [token], [slot], Commit(slot, spans_of([slot])))
    assert result is not None
    return result


def test_each_branch_of_a_tree_is_sampled_as_if_it_were_alone(source: SafetensorsSource) -> None:
    split = Split(source)
    split.open(TREE)
    split.prompt(TREE)
    runs = [SlotRun(4, 3, 3), SlotRun(7, 3, 3), SlotRun(10, 1, 5)]
    found = split.step(TREE, runs, [token for _, token in BRANCHES.values()], list(BRANCHES))
    expected = [alone(source, path_to(slot)) for slot in BRANCHES]
    assert found.tokens == tuple(result.tokens[0] for result in expected)
    for ours, theirs in zip(found.logprobs, (result.logprobs[0] for result in expected), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    # The winner is committed, the others die; what follows sees its tokens and none of theirs.
    after = split.step(TREE, [SlotRun(11, 1, 5)], [44], [11], Commit(4, spans_of([4, 5])))
    assert after.tokens == alone(source, [30, 31, 44]).tokens


def test_log_probabilities_come_only_where_they_are_asked_for(source: SafetensorsSource) -> None:
    split = Split(source)
    split.open(TREE, SamplingOptions(temperature=1.0))
    split.open(ALONE, SamplingOptions(temperature=1.0, logprobs=0))
    assert split.prompt(TREE).logprobs == ()
    (only,) = split.prompt(ALONE).logprobs
    assert only.logprob < 0.0
    assert only.top == ()


def test_a_tail_that_is_not_told_the_ids_refuses_the_window(source: SafetensorsSource) -> None:
    split = Split(source)
    split.open(TREE)
    work = StageWork(session=TREE, runs=(SlotRun(0, 1, -1),), rows=bytes(4 * 128))
    (result,) = asyncio.run(split.stages[1].step([work])).results
    assert isinstance(result.error, MalformedFrame)
    assert "1 slots came with 0 token ids" in str(result.error)


def test_a_bias_on_a_token_outside_the_vocabulary_is_refused(source: SafetensorsSource) -> None:
    with pytest.raises(SessionRefused, match="token 320, the vocabulary has 320"):
        Split(source).open(TREE, SamplingOptions(logit_bias=((320, 1.0),)))
