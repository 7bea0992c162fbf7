"""Which windows share a step, as tables, and what no queue can make it do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.ids import SessionId
from farflung.node.scheduling import Chosen, Pace, Waiting, choose_batch, room_for_others
from farflung.planning.curve import time_ms, tokens_within

CURVE = ((1, 10.0), (16, 12.0), (64, 28.0), (256, 100.0))
UNPACED = Pace(max_rows=256)
PACED = Pace(max_rows=256, curve_ms=CURVE)


def item(text: str) -> Waiting:
    """``d1``: decode, one row; ``p400``: prompt; ``D1``, ``P400``: of a batch session. The session is the text itself."""
    return Waiting(
        SessionId(text), int(text[1:].split("'", maxsplit=1)[0]), is_decode=text[0] in "dD", is_batch=text[0].isupper()
    )


def step(waiting: str, pace: Pace, decoding_rows: int = 0) -> str:
    """Chosen windows, with the number of rows where they were cut."""
    chosen = choose_batch([item(text) for text in waiting.split()], pace, decoding_rows)
    rows = {SessionId(text): item(text).rows for text in waiting.split()}
    return " ".join(f"{each.session}" + (f":{each.rows}" if each.rows < rows[each.session] else "") for each in chosen)


@pytest.mark.parametrize(
    ("waiting", "chosen"),
    [
        ("", ""),
        ("d1 d1'", "d1 d1'"),
        ("p128 d1 d1'", "d1 d1' p128"),
        ("p128 p128' p128''", "p128 p128'"),
        ("p512 d1", "d1 p512:255"),
        ("p100 p512", "p100 p512:156"),
        ("d64 d200 d64'", "d64 d64'"),
        ("d300 d1", "d300"),
        ("d250 p100", "d250 p100:16"),
        ("D1 d1 P100 p100", "d1 p100 D1 P100:30"),
        ("P300 p300", "p300:224 P300:32"),
        ("P300 D1 p300", "p300:224 D1 P300:31"),
        ("P300 D1", "D1 P300:255"),
        ("d250 P100 D1", "d250 D1 P100:5"),
        ("d256 D40 P100", "d256 D40 P100:1"),
    ],
    ids=[
        "nothing", "decode together", "decode before prompts", "prompts while they fit", "a long prompt is cut",
        "the last one is cut", "a tree that does not fit lets others by", "one tree always goes",
        "some rows of a prompt always go", "interactive before batch", "an eighth is kept for batch",
        "within batch decode goes first", "batch alone has it all", "batch takes what decode leaves",
        "some of batch always goes",
    ],
)  # fmt: skip
def test_a_step_holds(waiting: str, chosen: str) -> None:
    assert step(waiting, UNPACED) == chosen


@pytest.mark.parametrize(
    ("waiting", "decoding_rows", "chosen"),
    [
        ("p512", 0, "p512:256"),
        ("d1 p512", 0, "d1 p512:39"),  # 40 rows take 20 ms, twice what one takes
        ("p512", 1, "p512:40"),
        ("d16 p512", 0, "d16 p512:36"),  # 52 rows take 24 ms
        ("d1 p512", 16, "d1 p512:51"),
        ("D1 P512", 0, "D1 P512:255"),
        ("d1 P512", 0, "d1 P512:39"),
    ],
    ids=[
        "nobody decodes", "twice the time of decode alone", "decode that will come back counts", "more decode, more time",
        "and sets the pace where it is more", "batch decode sets no pace", "batch fills what is left of it",
    ],
)  # fmt: skip
def test_prompt_rows_keep_the_pace_of_decode(waiting: str, decoding_rows: int, chosen: str) -> None:
    assert step(waiting, PACED, decoding_rows) == chosen


@pytest.mark.parametrize(("ms", "tokens"), [(9.0, 0), (10.0, 1), (11.0, 8), (28.0, 64), (99.9, 255), (200.0, 512)])
def test_the_most_tokens_within_a_time(ms: float, tokens: int) -> None:
    assert tokens_within(CURVE, ms) == tokens


def test_a_curve_that_falls_somewhere_counts_where_it_first_rises_above() -> None:
    assert tokens_within(((1, 10.0), (16, 30.0), (64, 20.0), (256, 80.0)), 20.0) == 8


queues = st.lists(st.tuples(st.integers(1, 600), st.booleans(), st.booleans()), min_size=1, max_size=12).map(
    lambda found: [
        Waiting(SessionId(str(index)), 1 + rows % 64 if is_decode else rows, is_decode, is_batch)
        for index, (rows, is_decode, is_batch) in enumerate(found)
    ]
)


@given(queues, st.integers(0, 64))
def test_every_step_keeps_the_rules(waiting: list[Waiting], decoding_rows: int) -> None:
    chosen = choose_batch(waiting, PACED, decoding_rows)
    by_id = {found.session: found for found in waiting}
    assert len({choice.session for choice in chosen}) == len(chosen) > 0
    for choice in chosen:
        found = by_id[choice.session]
        assert 0 < choice.rows <= found.rows
        assert choice.rows == found.rows or not found.is_decode
    # The oldest of each kind always goes along: none starves.
    taken = {choice.session for choice in chosen}
    for is_decode in (True, False):
        for is_batch in (True, False):
            kind = [found for found in waiting if (found.is_decode, found.is_batch) == (is_decode, is_batch)]
            assert not kind or kind[0].session in taken
    # Beside interactive decode, the rest keeps to the bound, but for what always goes along.
    interactive = [found for found in waiting if not found.is_batch]
    decode = sum(choice.rows for choice in chosen if by_id[choice.session].is_decode and not by_id[choice.session].is_batch)
    prompts = sum(choice.rows for choice in chosen if not by_id[choice.session].is_decode)
    always = PACED.least_rows + sum(64 for found in waiting if found.is_batch)
    assert prompts <= max(room_for_others(PACED, decode, max(decode, decoding_rows)), always)
    if decode and not any(found.is_batch for found in waiting) and prompts > PACED.least_rows:
        most = max(decode, decoding_rows)
        assert time_ms(CURVE, decode + prompts) <= max(2 * time_ms(CURVE, most), time_ms(CURVE, most) + 10) + 1e-9
    assert interactive or decode == 0


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=8), st.integers(0, 4))
def test_whoever_waits_is_served_within_as_many_steps_as_sessions_wait(prompts: list[int], decoding: int) -> None:
    left = {SessionId(f"p{index}"): rows for index, rows in enumerate(prompts)}
    queue = [*left]
    steps_since = dict.fromkeys(queue, 0)
    while queue:
        waiting = [Waiting(SessionId(f"d{index}"), 1, is_decode=True) for index in range(decoding)]
        chosen = choose_batch([*waiting, *(Waiting(name, left[name], is_decode=False) for name in queue)], PACED, decoding)
        for choice in chosen:
            if choice.session in left:
                left[choice.session] -= choice.rows
                steps_since[choice.session] = -1
                queue.remove(choice.session)
                queue += [choice.session] if left[choice.session] else []
        for name in queue:
            steps_since[name] += 1
            assert steps_since[name] <= len(prompts)


def test_a_thousand_sessions_decode_in_turns() -> None:
    many = [Waiting(SessionId(f"d{number}"), 1, is_decode=True) for number in range(1000)]
    chosen = choose_batch([*many, Waiting(SessionId("p"), 100, is_decode=False)], PACED)
    assert chosen[:256] == [Chosen(found.session, 1) for found in many[:256]]
    assert chosen[256:] == [Chosen(SessionId("p"), 16)]
