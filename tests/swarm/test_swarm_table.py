from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swarm_samples import NOW, OTHER_DIGEST, a_record

from farflung.core.errors import RecordRefused
from farflung.core.ids import NodeId
from farflung.core.model import LayerRange
from farflung.identity.keys import Identity
from farflung.swarm.records import EVERYTHING, NodeRecord, Query, SignedRecord, Withdrawal
from farflung.swarm.table import Batch, Table, TableConfig

NODES = [Identity.generate() for _ in range(4)]
ALICE, BOB = NODES[:2]


def put(table: Table, record: NodeRecord, now: float = 0.0) -> int:
    """Number of changes. The table does not look at signatures: whoever calls it has opened the record."""
    return len(table.put(SignedRecord(b"", b""), record, now))


def leave(identity: Identity, sequence: int) -> Withdrawal:
    return Withdrawal(node_id=identity.node_id, sequence=sequence, issued_unix_s=NOW, ttl_s=60.0)


def ids(batch: Batch) -> list[NodeId]:
    return [entry.record.node_id for entry in batch.entries]


@pytest.mark.parametrize("sequence", [1, 2])
def test_a_record_that_is_not_newer_is_refused(sequence: int) -> None:
    table = Table()
    put(table, a_record(ALICE, sequence=2))
    with pytest.raises(RecordRefused, match=f"record {sequence} of node .* is not newer than 2"):
        put(table, a_record(ALICE, sequence=sequence))


def test_a_record_replayed_after_it_expired_or_was_withdrawn_is_refused() -> None:
    table = Table(TableConfig(memory_s=840.0))
    put(table, a_record(ALICE, sequence=5, ttl_s=10.0))
    put(table, a_record(BOB, sequence=5))
    table.withdraw(leave(BOB, 6), 1.0)
    assert len(table.expire(10.0)) == 1
    for identity, sequence in ((ALICE, 5), (BOB, 5), (BOB, 6)):
        with pytest.raises(RecordRefused, match="not newer"):
            put(table, a_record(identity, sequence=sequence), 800.0)
    table.expire(850.1)  # by now its time of issue refuses it
    assert put(table, a_record(ALICE, sequence=5), 850.1) == 1


def test_a_withdrawal_older_than_the_record_is_refused() -> None:
    table = Table()
    put(table, a_record(ALICE, sequence=5))
    with pytest.raises(RecordRefused):
        table.withdraw(leave(ALICE, 5), 0.0)
    assert ALICE.node_id in table
    table.withdraw(leave(ALICE, 6), 0.0)
    assert len(table) == 0
    assert table.withdraw(leave(BOB, 1), 0.0) == ()


def test_a_full_table_refuses_new_nodes_and_renews_known_ones() -> None:
    table = Table(TableConfig(max_nodes=2))
    put(table, a_record(NODES[0]))
    put(table, a_record(NODES[1]))
    with pytest.raises(RecordRefused, match="full: it keeps 2 nodes"):
        put(table, a_record(NODES[2]))
    put(table, a_record(NODES[0], sequence=2))
    table.withdraw(leave(NODES[1], 2), 0.0)
    assert put(table, a_record(NODES[2])) == 1


def test_a_record_expires_by_the_ttl_of_its_last_renewal() -> None:
    table = Table()
    put(table, a_record(ALICE, ttl_s=60.0), 0.0)
    put(table, a_record(BOB, ttl_s=60.0), 0.0)
    put(table, a_record(ALICE, sequence=2, ttl_s=60.0), 30.0)
    assert table.expire(59.9) == ()
    assert table.next_expiry_s <= 60.0
    assert [change.before and change.before.node_id for change in table.expire(60.0)] == [BOB.node_id]
    assert len(table.expire(90.0)) == 1
    assert table.expire(1e9) == ()


@pytest.mark.parametrize(
    ("changes", "is_change"),
    [
        ({"kv_free_tokens": 7, "issued_unix_s": NOW + 20}, False),
        ({"layers": "6:12"}, True),
        ({"status": "draining"}, True),
        ({"addresses": ("192.0.2.9:1",)}, True),
        ({"uplink_bytes_per_s": 5.0}, True),
    ],
)
def test_a_watcher_hears_of_changes_and_not_of_renewals(changes: dict[str, object], is_change: bool) -> None:
    table = Table()
    put(table, a_record(ALICE))
    revision = table.revision
    assert put(table, a_record(ALICE, sequence=2, **changes)) == is_change
    assert table.since(revision, EVERYTHING).is_news is is_change
    assert table.entries(EVERYTHING)[0].record.sequence == 2


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, {"digest": OTHER_DIGEST, "model": "x"}), ({"layers": "0:6"}, {"layers": "6:12"})],
)
def test_a_node_that_no_longer_fits_the_query_is_gone_for_its_watcher(
    before: dict[str, object], after: dict[str, object]
) -> None:
    query = Query(model="test/tiny", beside=LayerRange(6, 12))
    table = Table()
    put(table, a_record(ALICE, **before))
    revision = table.revision
    put(table, a_record(ALICE, sequence=2, **after))
    assert table.since(revision, query).gone == (ALICE.node_id,)
    assert ids(table.since(revision, EVERYTHING)) == [ALICE.node_id]
    assert table.since(revision, EVERYTHING).gone == ()
    assert not table.since(revision, Query(model="somebody else's")).is_news


def test_a_watcher_too_far_behind_or_from_another_run_gets_everything() -> None:
    table = Table(TableConfig(max_history=1))
    put(table, a_record(ALICE))
    put(table, a_record(BOB))
    put(table, a_record(NODES[2]))
    table.withdraw(leave(ALICE, 2), 0.0)
    one_behind = table.revision
    table.withdraw(leave(BOB, 2), 0.0)
    assert table.since(one_behind, EVERYTHING) == Batch(5, snapshot=False, gone=(BOB.node_id,))
    for revision in (None, one_behind - 1, 6):
        batch = table.since(revision, EVERYTHING)
        assert batch.snapshot
        assert ids(batch) == [NODES[2].node_id]


@dataclass
class Watcher:
    """What a faithful client of batches believes."""

    query: Query
    revision: int | None = None
    known: dict[NodeId, tuple[str, LayerRange]] = field(default_factory=dict)

    def hear(self, table: Table) -> None:
        batch = table.since(self.revision, self.query)
        if batch.snapshot:
            self.known.clear()
        for node_id in batch.gone:
            self.known.pop(node_id, None)
        for entry in batch.entries:
            self.known[entry.record.node_id] = (entry.record.model, entry.record.layers)
        self.revision = batch.revision


ACTIONS = st.one_of(
    st.tuples(
        st.just("put"),
        st.sampled_from(NODES),
        st.sampled_from(["test/tiny", "other"]),
        st.sampled_from(["0:6", "6:12", "12:18"]),
        st.sampled_from([1.0, 5.0, 60.0]),
    ),
    st.tuples(st.just("leave"), st.sampled_from(NODES)),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 3.0, 30.0])),
    st.tuples(st.just("hear"), st.integers(0, 2)),
)


@settings(max_examples=200)
@given(st.lists(ACTIONS, max_size=60), st.integers(0, 5))
def test_whoever_follows_changes_knows_what_the_table_holds_at_any_time_and_history(
    actions: list[tuple[object, ...]], max_history: int
) -> None:
    table = Table(TableConfig(max_history=max_history, max_nodes=3))
    watchers = [Watcher(EVERYTHING), Watcher(Query(model="other")), Watcher(Query(beside=LayerRange(6, 12)))]
    now = 0.0
    for sequence, action in enumerate(actions):
        table.expire(now)
        match action:
            case ("put", Identity() as identity, model, layers, ttl_s):
                record = a_record(identity, sequence=sequence, model=model, layers=layers, ttl_s=ttl_s)
                if identity.node_id in table or len(table) < 3:
                    put(table, record, now)
                else:
                    with pytest.raises(RecordRefused):
                        put(table, record, now)
            case ("leave", Identity() as identity):
                table.withdraw(leave(identity, sequence), now)
            case ("wait", float() as seconds):
                now += seconds
                assert all(change.before is not None for change in table.expire(now))
                assert all(entry.expires_s > now for entry in table.entries(EVERYTHING))
                assert table.next_expiry_s <= min((e.expires_s for e in table.entries(EVERYTHING)), default=float("inf"))
            case ("hear", int() as index):
                watchers[index].hear(table)
        assert len(table) <= 3
    for watcher in watchers:
        watcher.hear(table)
        truth = {entry.record.node_id: (entry.record.model, entry.record.layers) for entry in table.entries(watcher.query)}
        assert watcher.known == truth
