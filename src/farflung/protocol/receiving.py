"""A window comes from the predecessor: what is checked, what is taken (DESIGN.md, rules 1, 2, 5, 7, 9)."""

from __future__ import annotations

from msgspec.structs import replace

from farflung.core.errors import LeaseExceeded, ProtocolViolation
from farflung.core.messages import Window
from farflung.core.tree import TokenTree
from farflung.protocol.credit import WINDOW_COST_BYTES
from farflung.protocol.events import Payload, WindowReceived
from farflung.protocol.limits import MAX_EARLY_WINDOWS, MAX_WINDOW_ROWS
from farflung.protocol.stage_state import ID_BYTES, PendingWindow, StageState
from farflung.protocol.windows import keep_rows, pairs_of, slots_of


def receive(state: StageState, event: WindowReceived) -> tuple[StageState, list[int]]:
    """The state with the window in its queue, and the slots that came again.

    Raises ProtocolViolation, LeaseExceeded.
    """
    _check_shape(state, event)
    state = replace(state, receiver=state.receiver.receive(len(event.payload) + len(event.ids)))
    if not _fits(state.tree, event.window):
        if len(state.early) == MAX_EARLY_WINDOWS:
            raise ProtocolViolation(f"{MAX_EARLY_WINDOWS} windows wait for one that they build on, and another came")
        return replace(state, early=(*state.early, event)), []
    state, repeated = _take(state, event)
    while early := next((early for early in state.early if _fits(state.tree, early.window)), None):
        state = replace(state, early=tuple(other for other in state.early if other is not early))
        state, more = _take(state, early)
        repeated += more
    return state, repeated


def _check_shape(state: StageState, event: WindowReceived) -> None:
    """What can be said of a window without the tree."""
    window, rows = event.window, event.window.rows
    if window.epoch != state.epoch:
        raise ProtocolViolation(f"a window of epoch {window.epoch} came on an edge of epoch {state.epoch}")
    if rows > MAX_WINDOW_ROWS:
        raise ProtocolViolation(f"a window has {rows} rows, at most {MAX_WINDOW_ROWS} are allowed")
    expected = (rows * state.row_bytes, rows * ID_BYTES * state.has_ids)
    if (len(event.payload), len(event.ids)) != expected:
        raise ProtocolViolation(
            f"a window of {rows} rows carries {len(event.payload)} and {len(event.ids)} bytes, "
            f"expected {expected[0]} and {expected[1]}"
        )
    if rows > state.lease_tokens:
        raise LeaseExceeded(f"a window of {rows} rows is larger than the lease of {state.lease_tokens} tokens")
    if window.commit is not None and window.commit.stop > state.lease_tokens:
        raise ProtocolViolation(f"a commit up to position {window.commit.stop} is outside the lease of {state.lease_tokens}")
    if sum(span.count for span in window.want) > rows:
        raise ProtocolViolation("a window wants more answers than it has rows")
    if window.want and not set(slots_of(window)).issuperset(slot for span in window.want for slot in span):
        raise ProtocolViolation("a window wants answers for slots that it does not carry")


def _fits(tree: TokenTree, window: Window) -> bool:
    """Whether everything that the window builds on has come."""
    brought: set[int] = set()
    for run in window.runs:
        if not (run.parent in brought or tree.knows(run.parent)):
            return False
        brought.update(range(run.first, run.first + run.count))
    commit = window.commit
    if commit is None:
        return True
    return commit.start <= tree.committed_tokens and all(slot in brought or tree.knows(slot) for slot in commit.slots())


def _take(state: StageState, event: WindowReceived) -> tuple[StageState, list[int]]:
    """A window whose parents are here. What is held already is not taken again (rule 5)."""
    window, before = event.window, state.tree
    cost = len(event.payload) + len(event.ids) + WINDOW_COST_BYTES
    repeated = [slot for slot, parent in pairs_of(window) if _is_repeated(before, slot, parent)]
    if repeated:
        window, places = keep_rows(window, lambda slot: not before.knows(slot))
        event = only(state, event, window, places)
    tree, dead = before.add(window.runs)
    if window.commit is not None:
        tree, died = tree.commit(window.commit)
        dead |= died
    if tree.tokens > state.lease_tokens:  # the dead give up their cells before the new slots take theirs
        raise LeaseExceeded(
            f"{tree.tokens} tokens would be in use, the lease is {state.lease_tokens}",
            hint="open the session with a larger lease: prompt + max_tokens + slots in flight",
        )
    if len(tree.alive) > state.max_slots:
        raise ProtocolViolation(f"{len(tree.alive)} slots are not committed, at most {state.max_slots} are granted")
    if dead:
        window, places = keep_rows(window, lambda slot: slot not in dead)
        event = only(state, event, window, places)
    wanted = state.wanted.union(slot for span in window.want for slot in span)
    wanted = frozenset(slot for slot in wanted if slot == tree.root or slot in tree.alive)
    if window.next_slot > tree.next_slot:  # the last ones died before they came: a header that is made anew must tell it, too
        tree = replace(tree, next_slot=window.next_slot)
    pending = PendingWindow(window, event.payload, event.ids, tree, cost, event.at_s)
    return replace(state, tree=tree, wanted=wanted, queue=(*state.queue, pending)), repeated


def _is_repeated(tree: TokenTree, slot: int, parent: int) -> bool:
    """Raises ProtocolViolation where a slot that is held comes again in another place."""
    place = tree.alive.get(slot)
    if place is not None and place.parent != parent:
        raise ProtocolViolation(f"slot {slot} came under slot {place.parent} before, and now under slot {parent}")
    return tree.knows(slot)


def only(state: StageState, event: WindowReceived, window: Window, places: list[int] | None) -> WindowReceived:
    """The event with the rows at ``places`` alone; None: with all."""
    if places is None:
        return event
    return WindowReceived(
        window,
        _rows_at(event.payload, places, state.row_bytes),
        _rows_at(event.ids, places, ID_BYTES) if state.has_ids else b"",
        event.at_s,
    )


def _rows_at(payload: Payload, places: list[int], row_bytes: int) -> bytes:
    return b"".join(bytes(payload[place * row_bytes : (place + 1) * row_bytes]) for place in places)
