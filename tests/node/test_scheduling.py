"""Which windows share a step, as a table."""

import pytest

from farflung.core.ids import SessionId
from farflung.node.scheduling import Waiting, choose_batch


def decode(name: str, rows: int = 1) -> Waiting:
    return Waiting(SessionId(name), rows, is_decode=True)


def prefill(name: str, rows: int = 128) -> Waiting:
    return Waiting(SessionId(name), rows, is_decode=False)


@pytest.mark.parametrize(
    ("waiting", "chosen"),
    [
        ([], ""),
        ([decode("a"), decode("b")], "ab"),
        ([prefill("p"), decode("a"), decode("b")], "abp"),
        ([prefill("p"), prefill("q"), prefill("r")], "pq"),
        ([prefill("p", 512), decode("a")], "ap"),
        ([prefill("p", 512), prefill("q", 1)], "p"),
        ([decode("a", 64), decode("b", 200), decode("c", 64)], "ac"),
        ([decode("a", 300), decode("b")], "a"),
    ],
    ids=[
        "nothing", "decode together", "decode before prefill", "prefill while it fits", "a long prompt is not starved",
        "no further prefill beside a long one", "a window that does not fit lets smaller ones by", "one always goes",
    ],
)  # fmt: skip
def test_a_step_holds(waiting: list[Waiting], chosen: str) -> None:
    assert "".join(choose_batch(waiting, 256)) == chosen


def test_a_waiting_prompt_goes_along_however_many_sessions_decode() -> None:
    many = [decode(f"d{number}") for number in range(1000)]
    assert choose_batch([*many, prefill("p")], 256)[-1] == "p"
