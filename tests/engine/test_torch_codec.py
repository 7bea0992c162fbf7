"""The codecs for tensors give the bytes of the numpy ones, for every input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from farflung.core.errors import CodecError
from farflung.engine.codec import ON_DEVICE, decode, encode
from farflung.wire.codec import CODEC_NAMES, codec
from farflung.wire.floats import Float32
from farflung.wire.int8 import LIMIT

values = st.one_of(
    st.floats(width=32, min_value=-LIMIT, max_value=LIMIT),
    st.floats(width=32, min_value=-8, max_value=8),
    st.floats(width=32, min_value=-(2.0**-126), max_value=2.0**-126),  # denormals
    st.sampled_from([0.0, -0.0, 0.5, 1.5, 2.5, -2.5, 127.0, 5000.0, -5000.0, LIMIT, 2.0**-133, 2.0**-149]),
)
rows_of_any_shape = arrays.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 300)), elements=values)


@st.composite
def rows_with_ties(draw: st.DrawFn) -> Float32:
    """Few distinct values, so that magnitudes, block maxima and halves of a scale coincide; some a thousand times the rest."""
    n, width = draw(st.integers(1, 3)), draw(st.integers(1, 270))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = rng.integers(-8, 9, (n, width)).astype(np.float32) * np.float32(draw(st.sampled_from([0.5, 1.0, 3.0])))
    rows[:, rng.integers(0, width, draw(st.integers(0, 6)))] *= 1000
    return rows


@settings(deadline=None)
@given(st.one_of(rows_of_any_shape, rows_with_ties()))
def test_every_codec_gives_the_same_bytes_and_values(rows: Float32) -> None:
    width = rows.shape[1]
    for name in CODEC_NAMES:
        coded = encode(name, torch.from_numpy(rows))
        assert coded == codec(name).encode(rows)
        assert decode(name, coded, width).numpy().tobytes() == codec(name).decode(coded, width).tobytes()


@pytest.mark.parametrize("name", ON_DEVICE)
@given(rows=st.one_of(rows_of_any_shape, rows_with_ties()))
def test_torch_s_operators_give_the_same_bytes_and_values(name: str, rows: Float32) -> None:
    n, width = rows.shape
    coded = ON_DEVICE[name].encode(torch.from_numpy(rows))
    assert coded == codec(name).encode(rows)
    raw = torch.from_numpy(np.frombuffer(coded, np.uint8).reshape(n, codec(name).row_bytes(width)).copy())
    assert ON_DEVICE[name].decode(raw, width).numpy().tobytes() == codec(name).decode(coded, width).tobytes()


@pytest.mark.parametrize("name", ON_DEVICE)
def test_wide_rows_by_the_hundred_give_the_same_bytes(name: str) -> None:
    rows = np.random.default_rng(1).standard_normal((130, 4096), np.float32)
    rows[:, 5] *= 1000
    for tensor in (torch.from_numpy(rows), torch.from_numpy(rows).bfloat16()):  # bfloat16: many equal magnitudes
        coded = codec(name).encode(tensor.float().numpy())
        assert ON_DEVICE[name].encode(tensor.float()) == encode(name, tensor) == coded


@settings(deadline=None)
@given(rows_of_any_shape)
def test_bfloat16_rows_pass_through_the_bf16_codec_as_they_are(rows: Float32) -> None:
    tensor = torch.from_numpy(rows).bfloat16()
    coded = encode("bf16", tensor)
    assert coded == codec("bf16").encode(tensor.float().numpy())
    back = decode("bf16", coded, rows.shape[1], dtype=torch.bfloat16)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.view(torch.int16), tensor.view(torch.int16))


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_float_type_is_coded_as_its_float32(name: str, dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(np.random.default_rng(2).standard_normal((3, 200), np.float32)).to(dtype)
    coded = encode(name, tensor)
    assert coded == codec(name).encode(tensor.float().numpy())
    back = decode(name, coded, 200, dtype=dtype)
    assert back.dtype == dtype
    assert torch.equal(back, torch.from_numpy(codec(name).decode(coded, 200)).to(dtype))


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_slices_and_gradients_do_not_matter(name: str) -> None:
    tensor = torch.from_numpy(np.random.default_rng(3).standard_normal((400, 6), np.float32)).requires_grad_()
    expected = codec(name).encode(tensor.detach().numpy().T[::2].copy())
    assert encode(name, tensor.T[::2]) == expected
    lower = tensor.detach().bfloat16().T[::2]
    assert encode(name, lower) == codec(name).encode(lower.float().numpy())


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_row(name: str, dtype: torch.dtype, bad: float) -> None:
    tensor = torch.zeros((5, 130), dtype=dtype)
    tensor[3, 129] = bad
    with pytest.raises(CodecError, match=f"row 3 holds {bad} at position 129"):
        encode(name, tensor)
    if name in ON_DEVICE:
        with pytest.raises(CodecError, match=f"row 3 holds {bad} at position 129"):
            ON_DEVICE[name].encode(tensor.float())


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_that_do_not_fit_are_refused(name: str, dtype: torch.dtype) -> None:
    coded = encode(name, torch.ones((2, 130)))
    with pytest.raises(CodecError, match="no whole number"):
        decode(name, coded[:-1], 130, dtype=dtype)
    with pytest.raises(CodecError, match="row 0 "):
        decode(name, b"\xff" * len(coded), 130, dtype=dtype)


def test_integers_and_other_shapes_are_refused() -> None:
    for tensor in (torch.zeros((1, 4), dtype=torch.int32), torch.zeros(4), torch.zeros((1, 65_537), dtype=torch.bfloat16)):
        with pytest.raises(CodecError):
            encode("bf16", tensor)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(CodecError, match="int9"):
        encode("int9", torch.zeros((1, 4)))
    with pytest.raises(CodecError, match="int9"):
        decode("int9", b"", 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_gives_the_same_bytes() -> None:
    rows = np.random.default_rng(4).standard_normal((64, 896), np.float32)
    rows[:, 5] *= 1000
    for name in CODEC_NAMES:
        coded = encode(name, torch.from_numpy(rows).cuda())
        assert coded == codec(name).encode(rows)
        back = decode(name, coded, 896, device="cuda")
        assert back.cpu().numpy().tobytes() == codec(name).decode(coded, 896).tobytes()
