from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_sampling import recount, token_after

from farflung.core.errors import MalformedFrame, ProtocolViolation
from farflung.core.sampling import SamplingOptions
from farflung.core.tree import TokenTree
from farflung.core.window import Commit, SlotRun, spans_of
from farflung.sampling import Counts, SessionSampler, TokenHistory

VOCAB = 12
OPTIONS = SamplingOptions(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, seed=5)


def as_dict(counts: Counts) -> dict[int, tuple[int, int]]:
    """token id -> times in the text, in the output; without tokens that are not in the text."""
    rows = zip(counts.ids.tolist(), counts.in_text.tolist(), counts.in_output.tolist(), strict=True)
    found = [(token, text, output) for token, text, output in rows if text or output]
    assert len({token for token, _, _ in found}) == len(found)
    return {token: (text, output) for token, text, output in found}


class Oracle:
    """Whole texts, kept as lists."""

    def __init__(self) -> None:
        self.tree = TokenTree()
        self.text_of: dict[int, list[int]] = {-1: []}

    def window(self, data: st.DataObject) -> tuple[list[int], list[int]]:
        """Grows the tree by some random paths and perhaps commits one of its own; the new slots and their ids."""
        runs, ids = [], []
        first = self.tree.next_slot
        parents = [self.tree.root, *self.tree.alive]
        for _ in range(data.draw(st.integers(0, 3))):
            count = data.draw(st.integers(1, 4))
            parent = data.draw(st.sampled_from(parents))
            runs.append(SlotRun(first, count, parent))
            for slot in range(first, first + count):
                ids.append(data.draw(st.integers(0, VOCAB - 1)))
                self.text_of[slot] = [*self.text_of[parent], ids[-1]]
                parents.append(slot)
                parent = slot
            first += count
        self.tree, _ = self.tree.add(runs)
        slots = [slot for run in runs for slot in range(run.first, run.first + run.count)]
        if self.tree.alive and data.draw(st.booleans()):
            leaf = data.draw(st.sampled_from(sorted(self.tree.alive)))
            path = []
            while leaf in self.tree.alive:
                path.append(leaf)
                leaf = self.tree.alive[leaf].parent
            self.tree, _ = self.tree.commit(Commit(self.tree.committed_tokens, spans_of(path[::-1])))
        return slots, ids

    def visible(self, slots: list[int]) -> list[int]:
        """The alive, and of ``slots`` the committed."""
        return [*self.tree.alive, *(slot for slot in slots if self.tree.holds(slot) and slot not in self.tree.alive)]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), prompt=st.integers(0, 12))
def test_counts_are_those_of_the_whole_text_whatever_was_committed_or_died(data: st.DataObject, prompt: int) -> None:
    oracle, history = Oracle(), TokenHistory(prompt)
    for _ in range(data.draw(st.integers(1, 8))):
        slots, ids = oracle.window(data)
        history.advance(slots, np.array(ids, np.int32), oracle.tree)
        for slot in oracle.visible(slots):
            text = oracle.text_of[slot]
            assert as_dict(history.counts(slot, len(text) - 1)) == as_dict(recount(text[:prompt], text[prompt:]))


@settings(deadline=None, max_examples=40)
@given(data=st.data(), prompt=st.integers(0, 6), logits=st.integers(0, 2**32))
def test_a_branch_gets_the_token_it_gets_alone_whatever_tree_it_sits_in(data: st.DataObject, prompt: int, logits: int) -> None:
    oracle, sampler = Oracle(), SessionSampler(OPTIONS, prompt, VOCAB)
    for _ in range(data.draw(st.integers(1, 6))):
        slots, ids = oracle.window(data)
        sampler.advance(slots, np.array(ids, np.int32), oracle.tree)
        wanted = oracle.visible(slots)
        texts = [oracle.text_of[slot] for slot in wanted]
        rows = np.array([row_after(text, logits) for text in texts], np.float32).reshape(-1, VOCAB)
        found = sampler.sample(rows, wanted, [len(text) - 1 for text in texts])
        assert [sampled.token for sampled in found] == [
            token_after(row, OPTIONS, len(text), text[:prompt], text[prompt:]) for row, text in zip(rows, texts, strict=True)
        ]


def row_after(text: list[int], seed: int) -> np.ndarray:
    """Logits that are a function of the text."""
    return np.random.default_rng([seed, len(text), *text]).normal(0.0, 1.5, VOCAB).astype(np.float32)


def test_a_row_costs_the_different_tokens_of_its_text_not_its_length() -> None:
    history, tree, text = TokenHistory(0), TokenTree(), [7, 8, 9] * 3000
    tree, _ = tree.add([SlotRun(0, len(text), -1)])
    tree, _ = tree.commit(Commit(0, spans_of(range(len(text)))))
    history.advance(range(len(text)), np.array(text, np.int32), tree)
    assert len(history.counts(len(text) - 1, len(text) - 1).ids) == 3


def test_a_slot_that_the_tree_does_not_hold_is_refused() -> None:
    history = TokenHistory(0)
    tree, _ = TokenTree().add([SlotRun(0, 1, -1)])
    history.advance([0], np.array([3], np.int32), tree)
    with pytest.raises(ProtocolViolation, match="slot 5"):
        history.counts(5, 5)


def test_a_window_without_its_token_ids_is_refused_where_penalties_need_them() -> None:
    sampler = SessionSampler(OPTIONS, 0, VOCAB)
    with pytest.raises(MalformedFrame, match="2 slots came with 0 token ids"):
        sampler.check(None, 2)
    for outside in ([0, VOCAB], [-1, 0]):
        with pytest.raises(MalformedFrame, match="outside the vocabulary"):
            sampler.check(np.array(outside, np.int32), 2)
    sampler.check(np.array([0, VOCAB - 1], np.int32), 2)
    sampler.check(None, 0)
    SessionSampler(SamplingOptions(temperature=1.0), 0, VOCAB).check(None, 2)
