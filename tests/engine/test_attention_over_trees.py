"""Attention over random trees, commits and windows of several sessions, against each row's own text in plain sums."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.core.window import NO_SLOT, Commit, SlotRun, spans_of
from farflung.engine.attention import Scores, StepAttention
from farflung.engine.kv_pool import Extents, NewRows, SessionCells
from farflung.engine.kv_tensors import KvShape, KvTensors
from farflung.engine.segments import PassPlan, Segment

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6
CELLS = 400


@dataclass
class Text:
    """One session: its cells, and what was computed of every slot."""

    base: int
    cells: SessionCells
    parent: dict[int, int] = field(default_factory=dict)
    key: dict[int, torch.Tensor] = field(default_factory=dict)
    value: dict[int, torch.Tensor] = field(default_factory=dict)

    def window(self, data: st.DataObject) -> NewRows | None:
        """Grows the tree by random paths and perhaps commits; None where the lease is full."""
        tree, room = self.cells.tree, self.cells.free_cells
        if room < 3 or data.draw(st.integers(0, 3)) == 0:
            return None
        runs: list[SlotRun] = []
        new: list[int] = []
        old = [tree.root, *tree.alive]
        left = data.draw(st.just(1) | st.integers(1, min(room, 36)))
        while left:
            count = data.draw(st.just(left) | st.integers(1, left))
            parent = data.draw(st.sampled_from([(new or sorted(old))[-1], *old, *new[-3:]]))
            first = len(self.parent)
            runs.append(SlotRun(first, count, parent))
            self.parent.update(runs[-1].pairs())
            new += range(first, first + count)
            left -= count
        return self.cells.apply(tuple(runs), self._commit(data, runs, new))

    def _commit(self, data: st.DataObject, runs: list[SlotRun], new: list[int]) -> Commit | None:
        """Of the beginning of some path, such that no new slot dies."""
        grown, _ = self.cells.tree.add(runs)
        leaf = data.draw(st.sampled_from(sorted(grown.alive)))
        path = [slot for slot in self.path(leaf) if slot in grown.alive]
        path = path[: data.draw(st.integers(0, len(path)))]
        commit = Commit(grown.committed_tokens, spans_of(path))
        return commit if path and not grown.commit(commit)[1].intersection(new) else None

    def path(self, slot: int) -> list[int]:
        """From the first token to ``slot``."""
        found: list[int] = []
        while slot != NO_SLOT:
            found.append(slot)
            slot = self.parent[slot]
        return found[::-1]

    def expected(self, slot: int, query: torch.Tensor, scores: Scores) -> torch.Tensor:
        """[heads, value width] of one query [heads, width]."""
        seen = self.path(slot)[-scores.window if scores.window is not None else None :]
        each = HEADS // KV_HEADS
        keys = torch.stack([self.key[one] for one in seen], 1).repeat_interleave(each, 0)
        values = torch.stack([self.value[one] for one in seen], 1).repeat_interleave(each, 0)
        products = (keys @ query[:, :, None])[..., 0] * scores.scaling
        if scores.softcap is not None:
            products = torch.tanh(products / scores.softcap) * scores.softcap
        if scores.sinks is not None:
            products = torch.cat([products, scores.sinks[:, None]], 1)
        return (products.softmax(-1)[:, None, : len(seen)] @ values)[:, 0]


@settings(deadline=None, max_examples=25)
@given(data=st.data(), leases=st.lists(st.sampled_from([40, 40, 60, 90]), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_each_row_attends_to_its_own_text_and_to_nothing_else(data: st.DataObject, leases: list[int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    kv = KvTensors({0: KvShape(KV_HEADS, WIDTH, VALUE_WIDTH)}, CELLS, torch.float32)
    kv.keys[0].normal_(0, 30, generator=random)  # what sessions before them left
    kv.values[0].normal_(0, 1e4, generator=random)
    extents = Extents(CELLS)
    texts = [Text(extents.reserve(lease), SessionCells(lease)) for lease in leases]
    for _ in range(data.draw(st.integers(1, 6))):
        grown = [(text, rows) for text in texts if (rows := text.window(data)) is not None]
        grown.sort(key=lambda pair: (len(pair[1].slots), pair[0].base))
        if grown:
            check_pass(kv, grown, random)


def check_pass(kv: KvTensors, grown: list[tuple[Text, NewRows]], random: torch.Generator) -> None:
    slots = [(text, slot) for text, rows in grown for slot in rows.slots]
    query = torch.randn((1, HEADS, len(slots), WIDTH), generator=random)
    key = torch.randn((1, KV_HEADS, len(slots), WIDTH), generator=random)
    value = torch.randn((1, KV_HEADS, len(slots), VALUE_WIDTH), generator=random)
    segments: list[Segment] = []
    for text, rows in grown:
        segments.append(Segment(sum(segment.rows for segment in segments), text.base, rows, text.cells, torch.float32))
    for row, (text, slot) in enumerate(slots):
        text.key[slot], text.value[slot] = key[0, :, row], value[0, :, row]
    cells = torch.from_numpy(np.concatenate([rows.cells + text.base for text, rows in grown]))
    plan = PassPlan(segments, torch.float32)
    sinks = torch.randn(HEADS, generator=random)
    for window in (None, 5, 17):
        for scores in (Scores(0.3, window, None, None), Scores(0.3, window, 20.0, sinks)):
            found = StepAttention(kv, cells, plan).attend(0, query, key, value, scores)[0]
            expected = torch.stack([text.expected(slot, query[0, :, row], scores) for row, (text, slot) in enumerate(slots)])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 16])
def test_a_window_of_positions_reads_no_more_keys_after_a_tree_than_before(window: int | None) -> None:
    cells = SessionCells(900)
    cells.apply((SlotRun(0, 800, NO_SLOT),), Commit(0, spans_of(range(800))))
    read = []
    for runs, commit in (
        ((SlotRun(800, 1, 799),), Commit(800, spans_of([800]))),
        ((SlotRun(801, 1, 800), SlotRun(802, 1, 800)), None),  # a tree
        ((SlotRun(803, 1, 802),), Commit(801, spans_of([802]))),  # on its second branch: its cells are no slice
        ((SlotRun(804, 1, 803),), Commit(802, spans_of([803]))),
    ):
        keys = Segment(0, 0, cells.apply(runs, commit), cells, torch.float32).keys(window)
        read.append(keys.high - keys.low)
    if window is None:
        assert read[0] == 801
    else:
        assert max(read) <= window + 3
