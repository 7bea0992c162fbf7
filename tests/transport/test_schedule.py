from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.transport.link import Priority
from farflung.transport.uplink import Fragment, Schedule

C, D, P, B = Priority.CONTROL, Priority.DECODE, Priority.PREFILL, Priority.BULK


def push(schedule: Schedule[str], link: str, channel: int, priority: Priority, name: str, count: int = 1) -> None:
    """A frame of ``count`` fragments, named a0, a1, ..."""
    frame: list[Fragment] = [[f"{name}{index}".encode()] for index in range(count)]
    schedule.push(link, channel, priority, count, iter(frame))


def drain(schedule: Schedule[str], most: int = 1000) -> list[str]:
    written = []
    while most and (choice := schedule.pop()) is not None:
        written.append(bytes(choice[1][0]).decode())
        most -= 1
    return written


# Each row: what is pushed (link, channel, priority, name, fragments), and the order in which it must be written.
TABLE = [
    pytest.param([("x", 2, B, "a", 1), ("x", 4, B, "b", 1)], "a0 b0", id="equals go in order"),
    pytest.param([("x", 2, B, "a", 1), ("x", 4, D, "b", 1), ("x", 6, C, "c", 1)], "c0 b0 a0", id="urgent first"),
    pytest.param([("x", 2, B, "a", 2), ("y", 2, D, "b", 1)], "b0 a0 a1", id="urgent first across links"),
    pytest.param([("x", 2, B, "a", 3), ("x", 4, B, "b", 2)], "a0 b0 a1 b1 a2", id="equals take turns by fragment"),
    pytest.param([("x", 2, B, "a", 2), ("y", 2, B, "b", 2)], "a0 b0 a1 b1", id="also across links"),
    pytest.param([("x", 2, P, "a", 2), ("x", 2, P, "b", 1)], "a0 a1 b0", id="one channel is first in, first out"),
    pytest.param(
        [("x", 2, B, "a", 1), ("x", 2, C, "b", 1), ("y", 2, D, "c", 1)],
        "a0 b0 c0",
        id="in the way, thus urgent",
    ),
    pytest.param([("x", 2, C, "a", 1), ("x", 2, B, "b", 1), ("y", 2, D, "c", 1)], "a0 c0 b0", id="once out of the way, not"),
    pytest.param([("x", 2, B, "a", 2), ("y", 2, D, "c", 1), ("x", 2, C, "b", 1)], "a0 a1 b0 c0", id="no overtaking"),
]


@pytest.mark.parametrize(("frames", "order"), TABLE)
def test_the_next_fragment(frames: list[tuple[str, int, Priority, str, int]], order: str) -> None:
    schedule: Schedule[str] = Schedule()
    for frame in frames:
        push(schedule, *frame)
    assert drain(schedule) == order.split()
    assert schedule.idle


# The same, where two frames of each priority may be begun on a link.
BEGUN = [
    pytest.param([("x", 2, P, "a", 2), ("x", 4, P, "b", 2), ("x", 6, P, "c", 2)], "a0 b0 a1 b1 c0 c1", id="the third waits"),
    pytest.param([("x", 2, P, "a", 2), ("x", 4, P, "b", 2), ("x", 6, P, "c", 1)], "a0 b0 c0 a1 b1", id="or ends at once"),
    pytest.param([("x", 2, P, "a", 2), ("x", 4, P, "b", 2), ("y", 6, P, "c", 2)], "a0 b0 c0 a1 b1 c1", id="not on two links"),
    pytest.param(
        [("x", channel, P, name, 2) for channel, name in enumerate("abcd")] + [("x", 3, D, "e", 1)],
        "d0 d1 e0 a0 b0 a1 b1 c0 c1",
        id="or becomes more urgent",
    ),
    pytest.param(
        [("x", channel, P, name, 2) for channel, name in enumerate("abcd")] + [("x", 0, D, "e", 1)],
        "a0 a1 e0 b0 c0 b1 c1 d0 d1",
        id="one that becomes more urgent lets the next begin",
    ),
]


@pytest.mark.parametrize(("frames", "order"), BEGUN)
def test_few_frames_are_begun_at_a_time(frames: list[tuple[str, int, Priority, str, int]], order: str) -> None:
    schedule: Schedule[str] = Schedule(most_begun=2)
    for frame in frames:
        push(schedule, *frame)
    assert drain(schedule) == order.split()
    assert schedule.idle


def test_more_urgent_frames_begin_beside_any_number_of_others() -> None:
    schedule: Schedule[str] = Schedule(most_begun=2)
    for channel in range(9):
        push(schedule, "x", channel, B, f"b{channel}.", 3)
    assert drain(schedule, 3) == ["b0.0", "b1.0", "b0.1"]
    push(schedule, "x", 9, P, "p", 2)
    assert drain(schedule, 2) == ["p0", "p1"]


def test_an_urgent_frame_that_comes_late_waits_for_one_fragment_only() -> None:
    schedule: Schedule[str] = Schedule()
    push(schedule, "x", 2, B, "a", 5)
    assert drain(schedule, 2) == ["a0", "a1"]
    push(schedule, "x", 4, D, "b")
    assert drain(schedule) == ["b0", "a2", "a3", "a4"]


def test_a_link_without_room_is_passed_over_and_keeps_its_frames() -> None:
    schedule: Schedule[str] = Schedule()
    push(schedule, "x", 2, C, "a", 2)
    push(schedule, "y", 2, B, "b")
    assert drain(schedule, 1) == ["a0"]
    schedule.hold("x")
    push(schedule, "x", 4, C, "c")
    assert drain(schedule) == ["b0"]
    assert schedule.idle
    schedule.release("x")
    assert sorted(drain(schedule)) == ["a1", "c0"]


def test_what_is_dropped_is_never_written() -> None:
    schedule: Schedule[str] = Schedule()
    push(schedule, "x", 2, C, "a", 2)
    push(schedule, "y", 2, B, "b")
    schedule.drop("x")
    assert schedule.queued_bytes("x") == 0
    push(schedule, "x", 2, B, "new")
    assert drain(schedule) == ["b0", "new0"]


def test_queued_bytes_count_a_frame_until_its_last_fragment() -> None:
    schedule: Schedule[str] = Schedule()
    push(schedule, "x", 2, B, "a", 3)
    drain(schedule, 2)
    assert schedule.queued_bytes("x") == 3
    drain(schedule)
    assert schedule.queued_bytes("x") == 0


steps = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from("xyz"), st.integers(2, 9), st.sampled_from(Priority), st.integers(1, 4)),
        st.tuples(st.sampled_from(["hold", "release"]), st.sampled_from("xyz")),
        st.tuples(st.just("pop")),
    ),
    max_size=80,
)


@given(steps)
def test_whatever_happens_each_channel_writes_all_its_fragments_in_order(steps: list[tuple[object, ...]]) -> None:
    schedule: Schedule[str] = Schedule(most_begun=1)
    begun: dict[str, set[int]] = {link: set() for link in "xyz"}
    pushed: dict[tuple[str, int], list[str]] = {}
    written: dict[tuple[str, int], list[str]] = {}
    held: set[str] = set()

    def pop() -> bool:
        choice = schedule.pop()
        if choice is None:
            return False
        link, fragment = choice
        assert link not in held
        name, channel, *end = bytes(fragment[0]).decode().split("/")
        written.setdefault((link, int(channel)), []).append(name)
        (begun[link].discard if end else begun[link].add)(int(channel))
        assert len(begun[link]) <= len(Priority)  # one of each priority
        return True

    for number, step in enumerate(steps):
        match step:
            case ("push", str(link), int(channel), Priority() as priority, int(count)):
                names = [f"{number}.{index}" for index in range(count)]
                pushed.setdefault((link, channel), []).extend(names)
                tails = [*[""] * (count - 1), "/end"]
                frame: list[Fragment] = [[f"{name}/{channel}{tail}".encode()] for name, tail in zip(names, tails, strict=True)]
                schedule.push(link, channel, priority, count, iter(frame))
            case ("hold", str(link)):
                held.add(link)
                schedule.hold(link)
            case ("release", str(link)):
                held.discard(link)
                schedule.release(link)
            case _:
                pop()
    for link in "xyz":
        schedule.release(link)
    held.clear()
    while pop():
        pass
    assert written == pushed
    assert all(schedule.queued_bytes(link) == 0 for link in "xyz")
