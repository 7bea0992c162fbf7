"""The protocol as a whole against an oracle: whatever breaks, every answer is the one that the tokens of its path give.

A driver grows a random tree over three stages (``protocol_world``) while lines are cut, fall silent and come again, windows
overtake each other or come twice, credits and answers are lost, stages are replaced and nodes restart. Each answer is
recomputed from scratch. ``HYPOTHESIS_PROFILE=long`` runs thousands of histories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol_lines import STAGES, VOCABULARY, Shape
from protocol_world import World

from farflung.core.ids import NodeId
from farflung.core.messages import Window
from farflung.core.tree import TokenTree
from farflung.core.window import Commit, SlotRun, spans_of
from farflung.protocol import stage, windows
from farflung.protocol.credit import SlotCredit
from farflung.protocol.windows import runs_of

Action = tuple[str, int, int]

KINDS = (
    *["grow"] * 6,
    *["run"] * 6,
    "commit",
    "chunk",
    "cut",
    "silence",
    "cut owner",
    "attach",
    "twice",
    "replace",
    "restart",
    "rest",
)  # fmt: skip


def actions() -> st.SearchStrategy[list[Action]]:
    one = st.tuples(st.sampled_from(KINDS), st.integers(0, 63), st.integers(0, 2**16))
    return st.lists(one, max_size=12) | st.lists(one, min_size=20, max_size=80)


LEASES, GRANTS = st.sampled_from([20, 48]), st.sampled_from([4, 12])
SHAPES = st.builds(Shape, lease=LEASES, grant=GRANTS, width=st.sampled_from([1, 4000]), tells_ids=st.booleans()) | st.builds(
    Shape, lease=LEASES, grant=GRANTS, tells_ids=st.booleans(), overtaking=st.just(True)
)


@pytest.fixture(scope="module", autouse=True)
def _short_replays() -> Iterator[None]:
    """What goes out again takes several windows and answers though the trees are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "REPLAY_ROWS", 5)
        patch.setattr(windows, "MAX_WINDOW_ROWS", 4)
        patch.setattr(stage, "MAX_ANSWER_SLOTS", 3)
        yield


class Player:
    """Turns actions into events of a world."""

    def __init__(self, shape: Shape) -> None:
        self.world = World(shape)
        self.slots = SlotCredit().grant(NodeId("0" * 64), shape.grant)

    def play(self, action: Action) -> None:
        kind, a, b = action
        world, edge = self.world, a % STAGES
        match kind:
            case "grow":
                self.grow(1 + a % 6, Random(b))
            case "commit":
                self.commit_alone(Random(b))
            case "chunk":
                self.chunk(1 + a % 9)
            case "run":
                self.run(1 + a, Random(b))
            case "cut":
                world.cut(edge)
            case "silence":
                world.silence(edge)
            case "cut owner":
                world.cut_owner(tail_knows=bool(b % 2))
            case "attach":
                world.attach()
            case "twice":
                world.send_twice(edge)
            case "replace":
                world.replace(edge, politely=bool(b % 2))
            case "restart":
                world.restart(edge)
            case "rest":
                self.rest()
        world.check_credit()

    # -- the driver --------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Slots that may go out."""
        driver = self.world.driver
        return self.slots.room(driver.tree, driver.covered)

    def grow(self, count: int, random: Random) -> None:
        """Some slots anywhere in the tree; perhaps a commit, which may name them and kill some."""
        tree = self.world.driver.tree
        count = min(count, self.room)
        if count < 1:
            self.commit_alone(random)
            return
        parents, pairs = [tree.root, *tree.alive], list[tuple[int, int]]()
        for slot in range(tree.next_slot, tree.next_slot + count):
            near = random.random() < 0.6
            pairs.append((slot, parents[-1] if near else random.choice(parents)))
            parents.append(slot)
        grown, _ = tree.add(runs_of(pairs))
        commit = some_path(grown, random) if random.random() < 0.4 else None
        wanted = random.choice([0.0, 0.6, 1.0, 1.0])
        want = spans_of(slot for slot, _ in pairs if random.random() < wanted)
        self.send(Window(0, runs_of(pairs), want, commit), random)

    def commit_alone(self, random: Random) -> None:
        """A header: it asks for an acknowledgement, too."""
        commit = some_path(self.world.driver.tree, random) if random.random() < 0.8 else None
        self.send(Window(0, (), (), commit), random)

    def chunk(self, count: int) -> None:
        """A piece of a prompt."""
        tree = self.world.driver.tree
        slots = range(tree.next_slot, tree.next_slot + count)
        want = spans_of(slots[-1:])
        run = SlotRun(slots[0], count, tree.root)
        self.send(Window(0, (run,), want, Commit(tree.committed_tokens, spans_of(slots))), Random(count))

    def send(self, window: Window, random: Random) -> None:
        tree, _ = self.world.driver.tree.add(window.runs)
        if window.commit is not None:
            tree, _ = tree.commit(window.commit)
        if tree.tokens <= self.world.shape.lease:
            self.world.driver.send(window, [random.randrange(VOCABULARY) for _ in range(window.rows)])

    # -- everything else ---------------------------------------------------------------------------------------------

    def run(self, events: int, random: Random) -> None:
        """So many events of those that may happen."""
        for _ in range(events):
            possible = list(self.possible(random))
            if not possible:
                return
            random.choice(possible)()
            self.world.check_credit()

    def possible(self, random: Random, *, lines_too: bool = False) -> Iterator[Callable[[], None]]:
        """What may happen next; ``lines_too``: a silence is noticed, and the owner comes again."""
        world = self.world
        for edge in range(STAGES):
            if lines_too and world.is_silent(edge):
                yield partial(world.cut, edge)
                continue
            if world.may_connect(edge):
                yield partial(world.connect, edge)
            for line in world.may_deliver(edge):
                yield partial(world.deliver, edge, line, random.randrange(4) * world.shape.overtaking)
            if world.may_hear(edge) is not None:
                yield partial(world.hear, edge)
            session = world.stages[edge]
            if session is None:
                continue
            if session.work is not None:
                yield partial(session.finish, random.choice([1, 2, 99]))
            elif session.state.ready is not None:
                yield partial(session.start, random.choice([1, 3, 99]))
            if world.may_adopt(edge):
                yield partial(world.adopt, edge)
        if world.driver.tail is not None and world.driver.tail.back:
            yield self.take_answer
        if world.driver.tail is not None and world.driver.tail.there:
            yield world.tell
        if lines_too and world.driver.tail is None:
            yield world.attach

    def take_answer(self) -> None:
        line = self.world.driver.tail
        assert line is not None
        self.world.driver.take(line.back.pop(0))

    def rest(self) -> None:
        """Every line comes up and everything runs until nothing moves; then nobody may wait, and a header is acknowledged."""
        for header in (False, True):
            if header:
                self.send(Window(0, ()), Random(0))
            random = Random(1)
            for _ in range(20_000):
                possible = list(self.possible(random, lines_too=True))
                if not possible:
                    break
                random.choice(possible)()
                self.world.check_credit()
            else:
                raise AssertionError("it never comes to rest")
            self.world.check_rest()


def some_path(tree: TokenTree, random: Random) -> Commit | None:
    path, root = list[int](), tree.root
    for _ in range(random.choice([1, 1, 2, 4])):
        children = [slot for slot, place in tree.alive.items() if place.parent == root]
        if not children:
            break
        root = random.choice(children)
        path.append(root)
    if not path:
        return None
    start = tree.committed_tokens
    return Commit(start, spans_of(path))


@pytest.mark.timeout(3600)  # the long profile takes minutes
@given(SHAPES, actions())
def test_whatever_breaks_every_answer_is_what_its_path_gives_and_nobody_waits_for_ever(
    shape: Shape, history: list[Action]
) -> None:
    player = Player(shape)
    for action in history:
        player.play(action)
    player.rest()
