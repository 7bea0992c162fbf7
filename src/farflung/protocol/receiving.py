"""A window comes from the predecessor: what is checked, what is taken (DESIGN.md, rules 1, 2, 5, 7, 9)."""

from __future__ import annotations

from types import MappingProxyType

from msgspec.structs import replace

from farflung.core.errors import LeaseExceeded, ProtocolViolation
from farflung.core.messages import Window
from farflung.core.tree import TokenTree
from farflung.core.window import MAX_SLOT
from farflung.protocol.credit import WINDOW_COST_BYTES
from farflung.protocol.events import IdsReceived, WindowReceived
from farflung.protocol.limits import MAX_COMMIT_SLOTS, MAX_DEAD_SLOTS, MAX_EARLY_WINDOWS, MAX_WINDOW_ROWS
from farflung.protocol.stage_state import PendingWindow, StageState
from farflung.protocol.windows import keep_rows, pairs_of, slots_of


def receive(state: StageState, event: WindowReceived) -> tuple[StageState, list[int]]:
    """The state with the window in its queue, and the slots that came again.

    Raises ProtocolViolation, LeaseExceeded.
    """
    _check_shape(state, event)
    state = replace(state, receiver=state.receiver.receive(len(event.payload)))
    if not _fits(state.tree, event.window):
        if len(state.early) == MAX_EARLY_WINDOWS:
            raise ProtocolViolation(f"{MAX_EARLY_WINDOWS} windows wait for one that they build on, and another came")
        return replace(state, early=(*state.early, event)), []
    state, repeated = _take(state, event)
    if not event.window.rows and event.window.commit is None:
        return state, repeated  # nothing builds on it
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
    if len(event.payload) != rows * state.row_bytes:
        raise ProtocolViolation(
            f"a window of {rows} rows carries {len(event.payload)} bytes, expected {rows * state.row_bytes}"
        )
    if rows > state.lease_tokens:
        raise LeaseExceeded(f"a window of {rows} rows is larger than the lease of {state.lease_tokens} tokens")
    if window.commit is not None and window.commit.stop > state.lease_tokens:
        raise ProtocolViolation(f"a commit up to position {window.commit.stop} is outside the lease of {state.lease_tokens}")
    if window.commit is not None and window.commit.count > MAX_COMMIT_SLOTS:
        raise ProtocolViolation(f"a commit names {window.commit.count} slots, at most {MAX_COMMIT_SLOTS} are allowed")
    if not 0 <= window.next_slot <= MAX_SLOT:
        raise ProtocolViolation(f"a window says that slots up to {window.next_slot} have gone out")
    if window.timeline is not None and len(window.timeline) != state.place:
        raise ProtocolViolation(f"a window has passed {state.place} stages and brings times of {len(window.timeline)}")
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
    return commit.start <= tree.committed_tokens and all(
        slot in brought or tree.knows(slot) for span in commit.spans if span.first + span.count > tree.root + 1 for slot in span
    )


def _take(state: StageState, event: WindowReceived) -> tuple[StageState, list[int]]:
    """A window whose parents are here. What is held already is not taken again (rule 5)."""
    window, before = event.window, state.tree
    cost = len(event.payload) + WINDOW_COST_BYTES
    repeated = [slot for slot, parent in pairs_of(window) if _is_repeated(before, slot, parent)]
    if repeated:
        window, places = keep_rows(window, lambda slot: not before.knows(slot))
        event = only(state, event, window, places)
    tree, dead = before.add(window.runs)
    last = max((tree.alive[run.last].position for run in window.runs if run.last in tree.alive), default=0)
    if last >= state.context_tokens:
        raise LeaseExceeded(f"a slot at position {last} is beyond the context of {state.context_tokens} tokens")
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
    if len(tree.dead) > MAX_DEAD_SLOTS:
        raise ProtocolViolation(f"{len(tree.dead)} slots above the root are dead, at most {MAX_DEAD_SLOTS} are remembered")
    if dead:
        window, places = keep_rows(window, lambda slot: slot not in dead)
        event = only(state, event, window, places)
    wanted = state.wanted.union(slot for span in window.want for slot in span)
    wanted = frozenset(slot for slot in wanted if slot == tree.root or slot in tree.alive)
    if window.next_slot > tree.next_slot:  # the last ones died before they came: a header that is made anew must tell it, too
        tree = replace(tree, next_slot=window.next_slot)
    pending = PendingWindow(window, event.payload, cost, event.at_s)
    return replace(
        state, tree=tree, wanted=wanted, queue=(*state.queue, pending), queue_rows=state.queue_rows + window.rows
    ), repeated


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
    size = state.row_bytes
    rows = b"".join(bytes(event.payload[place * size : (place + 1) * size]) for place in places)
    return WindowReceived(window, rows, event.at_s)


def receive_ids(state: StageState, event: IdsReceived) -> StageState:
    """Keeps the tokens of slots that are still to be computed; the first that came for a slot stands.

    Raises ProtocolViolation for more than a session can hold.
    """
    ids = dict(state.ids)
    for slot, token in zip(event.slots, event.token_ids, strict=True):
        if not (state.computed.knows(slot) or slot in state.tree.dead):
            ids.setdefault(slot, token)
    if len(ids) > state.lease_tokens + state.max_slots:
        raise ProtocolViolation(f"the tokens of {len(ids)} slots were told before their rows came")
    return replace(state, ids=MappingProxyType(ids))


def check_ids(state: StageState, count: int) -> None:
    """Before so many ids are looked at. Raises ProtocolViolation where nobody wants them, or so many."""
    if not state.needs_ids:
        raise ProtocolViolation("token ids came to a stage that does not look at them")
    if count > state.lease_tokens + state.max_slots:
        raise ProtocolViolation(f"the tokens of {count} slots came for a lease of {state.lease_tokens}")
