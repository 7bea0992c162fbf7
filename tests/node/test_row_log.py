"""The log of coded rows against a dictionary, under budgets of a few rows; its file, when it lies and when it is left over."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from farflung.core.errors import Cancelled, ConfigError, LogEvicted, ProtocolViolation
from farflung.core.ids import SessionId
from farflung.node.log_budget import LogBudget, LogConfig
from farflung.node.page_file import PageFile
from farflung.node.row_log import ROW_OVERHEAD, RowLog

ROW = 24
IDS = 4
SESSION = SessionId("5e" * 16)


def ignore(session: SessionId, complete_from: int) -> None:
    """Nobody listens."""


class Oracle:
    """What one log must hold."""

    def __init__(self, log: RowLog) -> None:
        self.log = log
        self.rows: dict[int, bytes] = {}
        self.path: list[int] = []
        self.alive: list[int] = []
        self.awaited: list[int] = []
        self.next_slot = 0
        self.complete_from = 0

    @property
    def held(self) -> list[int]:
        given_up = set(self.path[: self.complete_from])
        return [slot for slot in self.rows if slot not in given_up]


class LogMachine(RuleBasedStateMachine):
    """Several sessions share a budget; their slots come, are committed, die and are asked for in any order allowed."""

    @initialize(memory=st.integers(0, 20), pages=st.integers(0, 6), page=st.integers(ROW - 1, 200))
    def start(self, memory: int, pages: int, page: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "log"
        config = LogConfig(memory * (ROW + ROW_OVERHEAD), pages * page, self.path, page)
        self.budget = LogBudget(config)
        self.sessions: dict[SessionId, Oracle] = {}
        self.opened = 0

    @precondition(lambda self: len(self.sessions) < 3)
    @rule()
    def open(self) -> None:
        self.opened += 1
        session = SessionId(f"{self.opened:032x}")
        log = self.budget.open(session, self.evicted)
        self.sessions[session] = Oracle(log)

    def evicted(self, session: SessionId, complete_from: int) -> None:
        oracle = self.sessions[session]
        assert complete_from > oracle.complete_from
        oracle.complete_from = complete_from

    def any_session(self, data: st.DataObject) -> Oracle:
        return data.draw(st.sampled_from(list(self.sessions.values())))

    def append(self, oracle: Oracle, slots: list[int], random_bytes: random.Random, *, as_view: bool) -> None:
        rows = random_bytes.randbytes(ROW * len(slots))
        for at, slot in enumerate(slots):
            oracle.rows[slot] = rows[at * ROW : at * ROW + ROW]
        oracle.log.append(tuple(slots), memoryview(rows) if as_view else rows)
        if set(slots) <= set(oracle.held):
            assert oracle.log.payload(slots) == rows

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), count=st.integers(1, 9), seed=st.randoms(use_true_random=False), gaps=st.booleans())
    def append_guesses(self, data: st.DataObject, count: int, seed: random.Random, gaps: bool) -> None:
        oracle = self.any_session(data)
        if oracle.awaited:  # parents first
            return
        slots = [oracle.next_slot + at * (1 + gaps) for at in range(count)]
        oracle.next_slot = slots[-1] + 1
        oracle.alive += slots
        self.append(oracle, seed.sample(slots, count) if gaps else slots, seed, as_view=gaps)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), count=st.integers(1, 30))
    def commit_before_the_rows_come(self, data: st.DataObject, count: int) -> None:
        oracle = self.any_session(data)
        oracle.log.drop(oracle.alive)
        for slot in oracle.alive:
            del oracle.rows[slot]
        slots = range(oracle.next_slot, oracle.next_slot + count)
        oracle.next_slot += count
        oracle.alive.clear()
        oracle.awaited += slots
        oracle.path += slots
        oracle.log.commit(slots)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), count=st.integers(1, 30), seed=st.randoms(use_true_random=False))
    def append_what_is_committed(self, data: st.DataObject, count: int, seed: random.Random) -> None:
        oracle = self.any_session(data)
        slots, oracle.awaited = oracle.awaited[:count], oracle.awaited[count:]
        if slots:
            self.append(oracle, slots, seed, as_view=False)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def commit_some_guesses_and_drop_others(self, data: st.DataObject) -> None:
        oracle = self.any_session(data)
        fates = data.draw(st.lists(st.booleans(), max_size=len(oracle.alive)))
        judged, oracle.alive = oracle.alive[: len(fates)], oracle.alive[len(fates) :]
        winners = [slot for slot, won in zip(judged, fates, strict=True) if won]
        losers = [slot for slot, won in zip(judged, fates, strict=True) if not won]
        for slot in losers:
            del oracle.rows[slot]
        oracle.path += winners
        oracle.log.commit(winners)
        oracle.log.drop(losers)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), seed=st.randoms(use_true_random=False))
    def ask_in_any_order(self, data: st.DataObject, seed: random.Random) -> None:
        oracle = self.any_session(data)
        slots = seed.sample(oracle.held, min(len(oracle.held), 20))
        assert oracle.log.payload(slots) == b"".join(oracle.rows[slot] for slot in slots)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def close_one(self, data: st.DataObject) -> None:
        oracle = self.any_session(data)
        del self.sessions[oracle.log.session]
        oracle.log.close()
        oracle.log.close()

    @invariant()
    def everything_not_given_up_is_there_and_equal(self) -> None:
        for oracle in getattr(self, "sessions", {}).values():
            log, held = oracle.log, oracle.held
            assert log.complete_from == oracle.complete_from
            assert log.holds(held)
            assert log.payload(held) == b"".join(oracle.rows[slot] for slot in held)
            for gone in oracle.path[: oracle.complete_from]:
                assert not log.holds([gone])

    @invariant()
    def budgets_hold(self) -> None:
        if not hasattr(self, "sessions"):
            return
        config = self.budget.config
        assert self.budget.disk_used <= config.disk_bytes
        # What is committed can always leave; uncommitted rows stay, in chunks of which at least half is theirs.
        alive = sum(len(oracle.alive) for oracle in self.sessions.values())
        assert self.budget.memory_used <= max(config.memory_bytes, 2 * alive * (ROW + IDS + ROW_OVERHEAD))
        assert self.budget.memory_used == sum(oracle.log.memory for oracle in self.sessions.values())

    def teardown(self) -> None:
        if not hasattr(self, "sessions"):
            return
        self.budget.close()
        assert (self.budget.memory_used, self.budget.disk_used) == (0, 0)
        assert list(self.path.glob("*")) == []
        assert self.budget.disk_error == ""
        self.folder.cleanup()


LogMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTheLogAgreesWithADictionary = LogMachine.TestCase


def small(path: Path | None, *, memory_rows: int = 2, pages: int = 4) -> LogBudget:
    """Four rows make a page."""
    return LogBudget(LogConfig(memory_rows * (ROW + ROW_OVERHEAD), pages * 4 * ROW, path, 4 * ROW))


def fill(log: RowLog, first: int, count: int) -> bytes:
    rows = random.Random(first).randbytes(ROW * count)
    for at in range(count):
        log.append((first + at,), rows[at * ROW : at * ROW + ROW])
        log.commit((first + at,))
    return rows


def open_file(budget: LogBudget) -> PageFile:
    assert budget._file is not None
    return budget._file


def test_the_chunk_last_appended_comes_back_as_the_very_object() -> None:
    log = LogBudget(LogConfig()).open(SESSION, ignore)
    chunk, row = bytes(ROW * 512), bytes(ROW)
    log.append(range(512), chunk)
    assert log.payload(range(512)) is chunk
    assert log.payload(list(range(512))) is chunk
    log.append((512,), row)
    assert log.payload((512,)) is row
    assert log.payload(range(513)) == chunk + row


def test_dead_rows_in_a_chunk_pin_at_most_as_much_as_the_live_ones() -> None:
    budget = LogBudget(LogConfig())
    log = budget.open(SESSION, ignore)
    rows = random.Random(1).randbytes(ROW * 100)
    log.append(range(100), rows)
    log.drop(range(0, 100, 2))
    assert budget.memory_used == 100 * (ROW + ROW_OVERHEAD)
    log.drop([1])
    assert budget.memory_used == 49 * (ROW + ROW_OVERHEAD)
    assert log.payload([99, 3]) == rows[-ROW:] + rows[3 * ROW : 4 * ROW]
    log.drop(range(100))
    assert budget.memory_used == 0


def test_eviction_takes_the_oldest_rows_of_the_largest_session_and_is_announced(tmp_path: Path) -> None:
    told: list[tuple[SessionId, int]] = []
    budget = small(tmp_path)
    other = SessionId("07" * 16)
    little, large = budget.open(other, ignore), budget.open(SESSION, lambda *news: told.append(news))
    kept = fill(little, 0, 1)
    rows = fill(large, 0, 40)
    assert told
    assert told[-1] == (SESSION, large.complete_from)
    assert little.payload([0]) == kept
    start = large.complete_from
    assert large.payload(range(start, 40)) == rows[start * ROW :]
    with pytest.raises(LogEvicted, match=f"slot {start - 1} .* complete from position {start} on"):
        large.payload([start - 1])


def test_rows_that_come_again_after_they_were_given_up_are_not_kept() -> None:
    budget = small(None)
    log = budget.open(SESSION, ignore)
    rows = fill(log, 0, 10)
    last, used = log.complete_from - 1, budget.memory_used
    for slot in (last, 0):
        log.append([slot], rows[:ROW])
        assert not log.holds([slot])
    assert (budget.memory_used, log.complete_from) == (used, last + 1)


def test_a_session_may_close_its_log_when_it_hears_of_an_eviction() -> None:
    budget = small(None)
    log = budget.open(SESSION, lambda *_: log.close())
    log.append(range(3), bytes(ROW * 3))
    log.commit(range(3))
    assert budget.memory_used == 0
    with pytest.raises(Cancelled):
        log.append([3], bytes(ROW))


@pytest.mark.parametrize("cut", [False, True])
def test_a_page_that_does_not_read_back_is_given_up_with_all_before_it(tmp_path: Path, cut: bool) -> None:
    told: list[int] = []
    budget = small(tmp_path)
    log = budget.open(SESSION, lambda _, start: told.append(start))
    rows = fill(log, 0, 10)
    assert not told
    assert budget.disk_used
    file = open_file(budget)._file
    assert file is not None
    if cut:
        file.truncate(5)
    else:
        file.seek(3)
        file.write(b"?")
    with pytest.raises(LogEvicted, match="bytes, .* were written" if cut else "hash differs"):
        log.payload([1])
    assert told == [log.complete_from]
    assert 0 < log.complete_from < 10
    if not cut:
        assert log.payload(range(log.complete_from, 10)) == rows[log.complete_from * ROW :]


def test_a_disk_that_refuses_costs_rows_and_not_the_session(tmp_path: Path) -> None:
    told: list[int] = []
    folder = tmp_path / "log"
    budget = small(folder)
    log = budget.open(SESSION, lambda _, start: told.append(start))
    folder.rmdir()
    rows = fill(log, 0, 10)
    assert "No such file" in budget.disk_error
    assert told[-1] == log.complete_from
    assert log.payload(range(log.complete_from, 10)) == rows[log.complete_from * ROW :]


def test_what_a_crash_left_is_swept_at_start_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "rows-k2j3.spill").write_bytes(b"left over")
    (tmp_path / "other").write_bytes(b"not ours")
    budget = small(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    budget.close()


def test_a_second_node_in_the_same_folder_takes_nothing_from_the_first(tmp_path: Path) -> None:
    budget = small(tmp_path)
    log = budget.open(SESSION, ignore)
    rows = fill(log, 0, 10)
    assert budget.disk_used
    small(tmp_path).close()
    assert log.payload(range(10)) == rows
    budget.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_told_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot keep row logs"):
        small(tmp_path / "file")


def test_what_does_not_fit_the_log_is_refused() -> None:
    log = LogBudget(LogConfig()).open(SESSION, ignore)
    with pytest.raises(ProtocolViolation):
        log.append([0, 1], b"123")
    log.append([0, 1], bytes(2 * ROW))
    for slots, rows in (([2], b"short"), ([1], bytes(ROW))):
        with pytest.raises(ProtocolViolation):
            log.append(slots, rows)
    with pytest.raises(ProtocolViolation):
        log.append([5, 5], bytes(2 * ROW))
    with pytest.raises(LogEvicted):
        log.payload([9])
    assert (log.payload([]), log.holds([0, 1]), log.holds([0, 9])) == (b"", True, False)
