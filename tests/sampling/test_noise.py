from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.sampling.kernel import words_kernel
from farflung.sampling.noise import MAX_NOISE, NoiseKey, gumbel, least_word, noise_key, noise_words, philox4x32

# Lines "philox4x32 10" of kat_vectors in Random123 1.14 (counter, key, output).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# (seed, choice, position, token id, k, noise), computed with plain integers and math.log, apart from the code under test.
GOLDEN = [
    (0, 0, 0, 0, 0x6AE80040, 0.13556187970857494),
    (0, 0, 0, 1, 0x4C49B60A, -0.19116786089372442),
    (0, 0, 1, 0, 0x3AE7A004, -0.3847555448281508),
    (0, 1, 0, 0, 0xAFE4BC0B, 0.9800328277784929),
    (1, 0, 0, 0, 0x09BB723D, -1.1847093224671337),
    (42, 0, 17, 151643, 0xADB988E4, 0.9475097053735916),
    (42, 3, 17, 151643, 0xECC2AD8C, 2.5494000002458015),
    (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 0x871FF892, 0.44788524258912205),
    (123456789, 0, 131071, 262143, 0xE32EA564, 2.1250662464847734),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, output: str) -> None:
    c0, c1, c2, c3 = (np.array([word], dtype=np.uint64) for word in words(counter))
    found = philox4x32((c0, c1, c2, c3), NoiseKey(*words(key)))
    assert [int(word[0]) for word in found] == words(output)


@pytest.mark.parametrize(("seed", "choice", "position", "token", "k", "noise"), GOLDEN)
def test_noise_is_what_the_protocol_fixed(seed: int, choice: int, position: int, token: int, k: int, noise: float) -> None:
    found = noise_words(noise_key(seed, choice), position, np.array([token], dtype=np.uint64))
    assert int(found[0]) == k
    assert gumbel(found)[0] == pytest.approx(noise, rel=1e-13)


def test_the_noise_of_a_token_does_not_depend_on_the_tokens_beside_it() -> None:
    key = noise_key(7, 0)
    every = noise_words(key, 3, np.arange(1000, dtype=np.uint64))
    some = noise_words(key, 3, np.array([999, 5, 5, 0], dtype=np.uint64))
    assert some.tolist() == [int(every[999]), int(every[5]), int(every[5]), int(every[0])]


def test_noise_is_finite_and_bounded_at_both_ends_of_the_words() -> None:
    low, high = gumbel(np.array([0, 2**32 - 1], dtype=np.uint64))
    assert -3.2 < low < -3.1
    assert MAX_NOISE - 1e-4 < high < MAX_NOISE


@given(st.floats(min_value=-4.0, max_value=23.0))
def test_every_word_with_enough_noise_is_at_or_above_the_least_word(noise: float) -> None:
    least = least_word(noise)
    below = np.array([max(0, least - 1)], dtype=np.uint64)
    assert least == 0 or gumbel(below)[0] < noise


def test_machine_code_and_numpy_give_the_same_words() -> None:
    kernel = words_kernel()
    if kernel is None:
        pytest.skip("numba is not here, so numpy makes all words")
    ids = np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32)
    for key, position in ((noise_key(0, 0), 0), (noise_key(2**64 - 1, 3), 2**32 - 1), (NoiseKey(2**32 - 1, 2**32 - 1), 17)):
        found = np.empty_like(ids)
        kernel(key.low, key.high, position, ids, found)
        assert np.array_equal(found, noise_words(key, position, ids))  # so few that numpy makes them


def test_many_words_are_those_made_one_by_one() -> None:
    ids = np.arange(40_000, dtype=np.uint32)
    some = np.concatenate([noise_words(noise_key(3, 0), 9, part) for part in np.array_split(ids, 40)])
    assert np.array_equal(noise_words(noise_key(3, 0), 9, ids), some)


@pytest.mark.parametrize(
    "module",
    [
        'raise AttributeError("another library has no such attribute")',
        'raise SystemError("made for another Python")',
        "class config: DISABLE_JIT = True\nnjit = uint32 = uint64 = None",
        "class config: DISABLE_JIT = False\nuint32 = uint64 = None\n"
        "def njit(*_, **__):\n    from numba.core.errors import NumbaError\n    raise NumbaError('it does not compile')",
    ],
    ids=["attribute", "system", "switched off", "does not compile"],
)
def test_a_numba_that_is_broken_or_switched_off_is_done_without(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numba" / "core").mkdir(parents=True)
    (tmp_path / "numba" / "__init__.py").write_text(module)
    (tmp_path / "numba" / "core" / "__init__.py").touch()
    (tmp_path / "numba" / "core" / "errors.py").write_text("class NumbaError(Exception): ...")
    for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert words_kernel.__wrapped__() is None
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
            del sys.modules[name]
