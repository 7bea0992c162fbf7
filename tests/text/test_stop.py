from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import UsageError
from farflung.text.stop import StopResult, StopStrings

TEXT = st.text(alphabet="abc", max_size=40)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4).map(tuple)


def whole_text_search(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(text=TEXT, stops=STOPS, data=st.data())
def test_any_chunking_gives_what_a_search_of_the_whole_text_gives(
    text: str, stops: tuple[str, ...], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    chunks = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    watch = StopStrings(stops)
    results = [*map(watch.push, chunks), watch.finish()]
    assert ("".join(result.text_to_emit for result in results), results[-1].stopped) == whole_text_search(text, stops)


@given(text=TEXT, stops=STOPS)
def test_nothing_is_held_back_that_no_stop_string_begins_with(text: str, stops: tuple[str, ...]) -> None:
    watch, given_out = StopStrings(stops), ""
    for count, character in enumerate(text, start=1):
        result = watch.push(character)
        if result.stopped is not None:
            return
        given_out += result.text_to_emit
        held = text[len(given_out) : count]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_across_chunks_is_found_and_left_out() -> None:
    watch = StopStrings(("\n\nUser:",))
    assert watch.push("Hello.\n") == StopResult("Hello.")
    assert watch.push("\nUs") == StopResult("")
    assert watch.push("er: and more") == StopResult("", "\n\nUser:")
    assert watch.push("more") == StopResult("", "\n\nUser:")
    assert watch.finish() == StopResult("", "\n\nUser:")


def test_a_beginning_that_leads_nowhere_is_given_out() -> None:
    watch = StopStrings(("END",))
    assert watch.push("the E") == StopResult("the ")
    assert watch.push("N") == StopResult("")
    assert watch.push("ergy") == StopResult("ENergy")
    assert watch.push("E") == StopResult("")
    assert watch.finish() == StopResult("E")


def test_no_stop_strings_hold_nothing_back() -> None:
    assert StopStrings(()).push("text") == StopResult("text")


@pytest.mark.parametrize("stops", [("",), ("a", ""), tuple(map(str, range(17)))])
def test_an_empty_stop_string_and_more_than_sixteen_are_refused(stops: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        StopStrings(stops)
