"""Codecs: what comes back, how near, in how many bytes, and what is refused."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from farflung.core.errors import CodecError
from farflung.wire import int4
from farflung.wire.codec import CODEC_NAMES, MAX_WIDTH, SLOW_ROW_S, choose_codec, codec
from farflung.wire.floats import Float32, round_to_bf16, widen
from farflung.wire.int8 import BLOCK, LIMIT, MAX_OUTLIER_BITS, MAX_SCALE_BITS, OUTLIERS, layout

shapes = st.tuples(st.integers(0, 5), st.integers(1, 300))
values = st.one_of(
    st.floats(width=32, min_value=-LIMIT, max_value=LIMIT),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 127.0, 127.5, 1000.0, LIMIT, -LIMIT, 2.0**-126, 2.0**-133, 2.0**-149]),
)
rows_of_any_shape = arrays.arrays(np.float32, shapes, elements=values)


def normal(n: int, width: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal((n, width), np.float32)


def largest(row: Float32, count: int = OUTLIERS) -> list[int]:
    """Positions of the outliers by the rule as it is written: greatest magnitude first, of equal ones the first."""
    return sorted(sorted(range(len(row)), key=lambda position: (-abs(float(row[position])), position))[:count])


@settings(deadline=None)
@given(rows_of_any_shape)
def test_fp32_gives_back_every_bit(rows: Float32) -> None:
    coded = codec("fp32").encode(rows)
    assert coded == rows.astype("<f4").tobytes()
    assert codec("fp32").decode(coded, rows.shape[1]).tobytes() == rows.tobytes()


@settings(deadline=None)
@given(rows_of_any_shape)
def test_bf16_gives_the_nearest_value_and_keeps_its_own(rows: Float32) -> None:
    decoded = codec("bf16").decode(codec("bf16").encode(rows), rows.shape[1])
    assert decoded.shape == rows.shape
    # Half a unit in the last place: 8 bits of significand, and the same step below the normal numbers.
    half_step = np.maximum(np.abs(rows.astype(np.float64)) * 2.0**-8, 2.0**-134)
    assert (np.abs(decoded.astype(np.float64) - rows) <= half_step).all()
    assert (np.signbit(decoded) == np.signbit(rows)).all()
    assert codec("bf16").encode(decoded) == codec("bf16").encode(rows)


def test_bf16_rounds_ties_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x00008000, 0x00018000], np.uint32)
    assert round_to_bf16(bits.view(np.float32)).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x0000, 0x0002]


@settings(deadline=None)
@given(rows_of_any_shape)
def test_int8_is_within_half_a_scale_and_keeps_the_largest_as_bf16(rows: Float32) -> None:
    n, width = rows.shape
    coded = codec("int8").encode(rows)
    decoded = codec("int8").decode(coded, width)
    assert decoded.shape == rows.shape
    place = layout(width)
    for row, back, raw in zip(
        rows, decoded, np.frombuffer(coded, np.uint8).reshape(n, codec("int8").row_bytes(width)), strict=True
    ):
        head = raw[: place.head_bytes].copy().view(np.uint16)
        scales = widen(head[place.factors]).astype(np.float64)
        kept = largest(row)
        assert head[place.positions].tolist() == kept
        assert back[kept].tobytes() == widen(round_to_bf16(row[kept])).tobytes()

        rest = row.astype(np.float64)
        rest[kept] = 0.0
        error = np.abs(back - rest)
        error[kept] = 0.0
        # Beside the half step, a unit of float32 in the quotient and in the product; blocks below 63 x 2^-149 become zero.
        assert (error <= scales.repeat(BLOCK)[:width] * (0.5 + 2.0**-16) + 2.0**-143).all()
        for block in range(place.blocks):
            amax = float(np.abs(rest[block * BLOCK : (block + 1) * BLOCK]).max())
            assert amax <= scales[block] * 127 * (1 + 2.0**-23) + 2.0**-143
            assert scales[block] <= amax / 127 * (1 + 2.0**-7) + 2.0**-133


few_values = arrays.arrays(np.float32, shapes, elements=st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0, 3.5, 500.0]))  # many ties


@settings(deadline=None)
@given(rows_of_any_shape | few_values)
def test_int4_is_within_a_scale_and_keeps_the_largest_as_bf16(rows: Float32) -> None:
    n, width = rows.shape
    coded = codec("int4").encode(rows)
    decoded = codec("int4").decode(coded, width)
    assert decoded.shape == rows.shape
    place = int4.layout(width)
    for row, back, raw in zip(rows, decoded, np.frombuffer(coded, np.uint8).reshape(n, int4.row_bytes(width)), strict=True):
        head = raw[: place.head_bytes].copy().view(np.uint16)
        step = float(widen(head[:1])[0])
        steps = raw[place.scales].view(np.int8).astype(int)
        kept = largest(row, int4.OUTLIERS)
        assert head[place.positions].tolist() == kept
        assert back[kept].tobytes() == widen(round_to_bf16(row[kept])).tobytes()

        rest = row.astype(np.float64)
        rest[kept] = 0.0
        for block in range(place.blocks):
            values, found = rest[block :: place.blocks], back[block :: place.blocks].astype(np.float64)
            found[[at for at, position in enumerate(range(block, width, place.blocks)) if position in kept]] = 0.0
            amax, scale = float(np.abs(values).max(initial=0.0)), abs(steps[block]) * step
            error = np.abs(found - values)
            if not scale:  # what is so small beside the step becomes zero
                assert amax <= 8 * step * 2.0**-149
                assert not found.any()
                continue
            assert error.max(initial=0.0) <= scale * (1 + 2.0**-20)
            assert (error <= scale * (0.5 + 2.0**-20))[np.abs(values) <= 7 * scale].all()
            assert amax <= 8 * scale * (1 + 2.0**-20)
            assert scale <= amax / 8 + step * (1 + 2.0**-20)
            assert (steps[block] < 0) == (amax in values)  # the largest becomes -8


def test_a_first_token_s_row_keeps_its_precision() -> None:
    rows = normal(1, 4096)
    rows[0, [7, 1000, 2000]] = [3000.0, -2500.0, 1800.0]
    error = np.abs(codec("int8").decode(codec("int8").encode(rows), 4096) - rows)
    error[0, [7, 1000, 2000]] = 0
    assert error.max() < 0.02
    error = np.abs(codec("int4").decode(codec("int4").encode(rows), 4096) - rows)
    error[0, [7, 1000, 2000]] = 0
    assert error.max() < 0.4


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    rows = np.zeros((2, 300), np.float32)
    rows[0, 10:290:7] = -2.0
    place = layout(300)
    raw = np.frombuffer(codec("int8").encode(rows), np.uint8).reshape(2, -1)
    heads = raw[:, : place.head_bytes].copy().view(np.uint16)
    assert heads[:, place.positions].tolist() == [[10, 17, 24, 31], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("fp32", 4096, 16384),
        ("bf16", 4096, 8192),
        ("int8", 4096, 4096 + 32 * 2 + 4 * 4),
        ("int8", 896, 896 + 7 * 2 + 16),
        ("int8", 129, 129 + 2 * 2 + 16),
        ("int8", 3, 3 + 2 + 12),
        ("int8", 1, 1 + 2 + 4),
        ("int4", 4096, 2048 + 256 + 2 + 4 * 16),
        ("int4", 896, 448 + 56 + 2 + 64),
        ("int4", 33, 3 * 8 + 3 + 2 + 64),
        ("int4", 1, 8 + 1 + 2 + 4),
    ],
)
def test_a_row_has_its_stated_size(name: str, width: int, expected: int) -> None:
    assert codec(name).row_bytes(width) == expected
    assert len(codec(name).encode(normal(3, width))) == 3 * expected


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("width", [1, 3, 4, 5, 127, 128, 130, 4096, MAX_WIDTH])
def test_rows_are_coded_one_by_one_however_many_there_are(name: str, width: int) -> None:
    rows = normal(40 if width <= 4096 else 3, width)
    apart = b"".join(codec(name).encode(rows[index : index + 1]) for index in range(len(rows)))
    together = codec(name).encode(rows)
    assert together == apart
    size = codec(name).row_bytes(width)
    decoded = codec(name).decode(together, width)
    assert decoded[1:2].tobytes() == codec(name).decode(memoryview(together)[size : 2 * size], width).tobytes()


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_no_rows_are_no_bytes(name: str) -> None:
    assert codec(name).encode(normal(0, 7)) == b""
    assert codec(name).decode(b"", 7).shape == (0, 7)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_rows_with_gaps_and_buffers_at_odd_addresses_are_taken(name: str) -> None:
    rows = normal(5, 260)[::2, ::2]
    coded = codec(name).encode(rows)
    assert coded == codec(name).encode(rows.copy())
    shifted = memoryview(b"x" + coded)[1:]
    assert codec(name).decode(shifted, 130).tobytes() == codec(name).decode(coded, 130).tobytes()


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_what_is_decoded_is_the_caller_s_own(name: str) -> None:
    buffer = bytearray(codec(name).encode(normal(2, 130)))
    decoded = codec(name).decode(buffer, 130)
    before = decoded.copy()
    buffer[:] = bytes(len(buffer))
    decoded += 0
    assert (decoded == before).all()


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [1, 60])
def test_a_value_that_is_not_finite_is_refused_with_its_row(name: str, bad: float, n: int) -> None:
    rows = normal(n, 4096)
    rows[n - 1, 77] = bad
    with pytest.raises(CodecError, match=f"row {n - 1} holds {bad} at position 77"):
        codec(name).encode(rows)


def test_a_value_that_bf16_would_round_to_infinity_is_refused_and_the_one_below_is_not() -> None:
    below, above = np.array([0x7F7F7FFF, 0x7F7F8000], np.uint32).view(np.float32)
    assert codec("bf16").encode(np.array([[below]])) == b"\x7f\x7f"
    with pytest.raises(CodecError, match=r"row 0 holds 3\.3961775\S* at position 1"):
        codec("bf16").encode(np.array([[below, above]]))


def test_int8_carries_its_limit_and_nothing_above() -> None:
    rows = np.full((1, 300), LIMIT, np.float32)
    coded = codec("int8").encode(rows)
    place = layout(300)
    head = np.frombuffer(coded, np.uint8)[: place.head_bytes].copy().view(np.uint16)
    assert head[place.factors].tolist() == [MAX_SCALE_BITS] * 3
    assert head[place.outliers].tolist() == [MAX_OUTLIER_BITS] * 4
    assert np.isfinite(codec("int8").decode(coded, 300)).all()
    rows[0, 299] = np.nextafter(np.float32(LIMIT), np.float32(np.inf))
    with pytest.raises(CodecError, match=r"row 0 .* position 299"):
        codec("int8").encode(rows)


def test_int4_carries_its_limit_and_nothing_above() -> None:
    rows = np.full((1, 300), LIMIT, np.float32)
    coded = codec("int4").encode(rows)
    place = int4.layout(300)
    head = np.frombuffer(coded, np.uint8)[: place.head_bytes].copy().view(np.uint16)
    assert head[0] == int4.MAX_STEP_BITS
    assert head[place.outliers].tolist() == [int4.MAX_OUTLIER_BITS] * int4.OUTLIERS
    assert np.isfinite(codec("int4").decode(coded, 300)).all()
    rows[0, 299] = np.nextafter(np.float32(LIMIT), np.float32(np.inf))
    with pytest.raises(CodecError, match=r"row 0 .* position 299"):
        codec("int4").encode(rows)


@pytest.mark.parametrize("name", CODEC_NAMES)
@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(1, 100))
def test_random_bytes_decode_to_finite_values_or_a_codec_error(name: str, data: bytes, width: int) -> None:
    try:
        decoded = codec(name).decode(data, width)
    except CodecError:
        return
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("name", CODEC_NAMES)
@settings(deadline=None)
@given(st.data())
def test_rows_of_the_right_size_and_random_bytes_decode_to_finite_values_or_a_codec_error(
    name: str, data: st.DataObject
) -> None:
    width = data.draw(st.integers(1, 140))
    size = codec(name).row_bytes(width)
    raw = data.draw(st.binary(min_size=2 * size, max_size=2 * size))
    try:
        decoded = codec(name).decode(raw, width)
    except CodecError:
        return
    assert np.isfinite(decoded).all()


def damaged_int8(word: int, bits: int) -> bytes:
    """The second of two rows of width 130 with one word of its head replaced."""
    size = codec("int8").row_bytes(130)
    coded = bytearray(codec("int8").encode(normal(2, 130)))
    coded[size + 2 * word : size + 2 * word + 2] = bits.to_bytes(2, "little")
    return bytes(coded)


@pytest.mark.parametrize(
    ("word", "bits"),
    [
        (0, 0x7FC0),  # scale: NaN
        (0, 0x7F80),  # infinity
        (1, MAX_SCALE_BITS + 1),  # so great that a product would overflow
        (1, 0xBF80),  # negative
        (5, 130),  # position past the row
        (5, 0xFFFF),
        (2, 129),  # out of order
        (6, 0xFF80),  # outlier: infinity
        (9, 0x7FC1),  # NaN
        (9, MAX_OUTLIER_BITS + 1),
    ],
)
def test_an_int8_head_that_no_encoder_writes_is_refused_with_its_row(word: int, bits: int) -> None:
    with pytest.raises(CodecError, match="row 1 "):
        codec("int8").decode(damaged_int8(word, bits), 130)


def test_a_position_named_twice_is_refused() -> None:
    place = layout(130)
    head = np.frombuffer(codec("int8").encode(normal(2, 130)), np.uint8).reshape(2, -1)[1, : place.head_bytes]
    first = int(head.copy().view(np.uint16)[place.positions][0])
    with pytest.raises(CodecError, match="row 1 "):
        codec("int8").decode(damaged_int8(place.positions.start + 1, first), 130)


@pytest.mark.parametrize(
    ("word", "bits"),
    [
        (0, 0x7FC0),  # step: NaN
        (0, int4.MAX_STEP_BITS + 1),  # so great that a product would overflow
        (0, 0xBF80),  # negative
        (16, 130),  # position past the row
        (1, 129),  # out of order
        (17, 0xFF80),  # outlier: infinity
        (32, int4.MAX_OUTLIER_BITS + 1),
    ],
)
def test_an_int4_head_that_no_encoder_writes_is_refused_with_its_row(word: int, bits: int) -> None:
    size = int4.row_bytes(130)
    coded = bytearray(codec("int4").encode(normal(2, 130)))
    coded[size + 2 * word : size + 2 * word + 2] = bits.to_bytes(2, "little")
    with pytest.raises(CodecError, match="row 1 "):
        codec("int4").decode(coded, 130)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_size_that_does_not_fit_is_refused_before_anything_is_allocated(name: str) -> None:
    data = bytes(codec(name).row_bytes(MAX_WIDTH) + 1)
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match="no whole number"):
            codec(name).decode(data, MAX_WIDTH)
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("name", "size"), [("fp32", 4), ("bf16", 2)])
def test_coded_infinities_and_nans_are_refused_with_their_row(name: str, size: int) -> None:
    coded = bytearray(codec(name).encode(normal(3, 8)))
    for top in (b"\x80\x7f", b"\xc0\xff"):
        at = 8 * size + 5 * size + size - 2
        coded[at : at + 2] = top
        with pytest.raises(CodecError, match="row 1 "):
            codec(name).decode(coded, 8)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_size_that_is_no_number_of_rows_is_refused_with_the_numbers(name: str) -> None:
    size = codec(name).row_bytes(896)
    assert codec(name).rows_in(3 * size, 896) == 3
    with pytest.raises(CodecError, match=f"{size - 1} bytes .* width 896: a row has {size} bytes"):
        codec(name).decode(bytes(size - 1), 896)


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("width", [0, -1, MAX_WIDTH + 1])
def test_a_width_out_of_range_is_refused(name: str, width: int) -> None:
    with pytest.raises(CodecError, match=f"not of {width}"):
        codec(name).row_bytes(width)
    with pytest.raises(CodecError):
        codec(name).decode(b"", width)


def test_a_row_wider_than_positions_reach_is_refused() -> None:
    with pytest.raises(CodecError, match="65537"):
        codec("int8").encode(np.zeros((1, MAX_WIDTH + 1), np.float32))


@pytest.mark.parametrize("rows", [np.zeros(4, np.float32), np.zeros((1, 4)), np.zeros((1, 1, 4), np.float32)])
def test_another_shape_or_type_is_refused(rows: np.ndarray) -> None:
    with pytest.raises(CodecError, match="takes float32"):
        codec("fp32").encode(rows)


def test_an_unknown_codec_is_refused_with_those_there_are() -> None:
    with pytest.raises(CodecError, match="'int9'") as caught:
        codec("int9")
    assert "int8" in caught.value.hint


def test_an_edge_takes_the_first_allowed_codec_that_the_other_end_speaks() -> None:
    assert choose_codec(("int4", "int8"), ("fp32", "int8"), width=4096) == "int8"
    assert choose_codec(("bf16", "int8"), CODEC_NAMES, width=4096) == "bf16"
    assert choose_codec(("from next year", "bf16"), ("from next year", "bf16"), width=4096) == "bf16"


def test_a_link_too_slow_for_the_preferred_codec_takes_the_next_smaller_one() -> None:
    def at(rate_bytes_per_s: float | None) -> str:
        return choose_codec(("bf16", "fp32", "int8"), CODEC_NAMES, width=4096, rate_bytes_per_s=rate_bytes_per_s)

    assert at(None) == at(0.0) == at(8192 / SLOW_ROW_S) == "bf16"
    assert at(8191 / SLOW_ROW_S) == "int8"
    assert at(1.0) == "int8"  # nothing is fast enough: the smallest


codec_sets = st.sets(st.sampled_from(CODEC_NAMES), min_size=1)


@given(st.permutations(CODEC_NAMES), codec_sets, st.floats(1, 1e9), st.integers(1, 20_000))
def test_what_is_preferred_to_the_chosen_codec_is_not_spoken_or_too_slow(
    allowed: list[str], theirs: set[str], rate_bytes_per_s: float, width: int
) -> None:
    def is_slow(name: str) -> bool:
        return codec(name).row_bytes(width) > rate_bytes_per_s * SLOW_ROW_S

    chosen = choose_codec(allowed, theirs, width=width, rate_bytes_per_s=rate_bytes_per_s)
    assert chosen in theirs
    if is_slow(chosen):
        assert all(codec(name).row_bytes(width) >= codec(chosen).row_bytes(width) for name in theirs)
    else:
        assert all(is_slow(name) for name in theirs.intersection(allowed[: allowed.index(chosen)]))


def test_no_codec_in_common_is_refused_with_both_lists() -> None:
    for allowed, theirs in ((("int8",), ("fp32",)), ((), ("fp32",)), (("int8",), ()), (("unknown",), ("unknown",))):
        with pytest.raises(CodecError, match="no codec in common") as caught:
            choose_codec(allowed, theirs, width=64)
        assert "int8" in caught.value.hint
