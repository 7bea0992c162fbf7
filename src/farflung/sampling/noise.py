"""Gumbel noise that depends on nothing but (seed, choice, position, token id).

The tail adds it to the logits and takes the greatest (the Gumbel-max trick), so the token that follows a text is a function
of the text and the seed: the same on every machine, in every token tree, before and after a repair. Hence a guess is verified
by equality.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123) is a counter-based generator:
the noise of any token is computed alone, without the others. Invariant: every number here is part of the protocol. A change of
one bit makes nodes disagree on tokens; the golden vectors in the tests hold it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from farflung.sampling.kernel import words_kernel

Words = NDArray[np.uint32]
"""32-bit words, one per element."""

Word = Any
"""uint64, so that a product of two 32-bit words is exact: an array, or an int for all elements (numpy has no such type)."""

Ids = NDArray[np.integer[Any]]
"""Token ids."""

_DOMAIN = b"farflung sampling noise v1\n"

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BLOCK = 16_384  # words whose intermediate values stay in the second-level cache
_MANY = 16_384  # below, numpy is quick enough and the machine code need not be loaded

MAX_NOISE = 22.8739
"""No noise is greater: k = 2^32 - 1 gives 33 ln 2 = 22.87385..."""


class NoiseKey(NamedTuple):
    """The two words of a Philox key."""

    low: int
    high: int


def noise_key(seed: int, choice: int) -> NoiseKey:
    """The key of one choice of one generation.

    Args:
        seed: unsigned, 64 bits.
        choice: unsigned, 32 bits.
    """
    digest = blake3(_DOMAIN + seed.to_bytes(8, "little") + choice.to_bytes(4, "little")).digest(length=8)
    return NoiseKey(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def philox4x32(counter: tuple[Word, Word, Word, Word], key: NoiseKey) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 of many counters under one key.

    The four words broadcast against each other. What all counters share is given as a plain number: what depends only on such
    words is computed once.
    """
    return _rounds(counter, key, _ROUNDS)[0]


def _rounds(
    counter: tuple[Word, Word, Word, Word], key: NoiseKey, count: int
) -> tuple[tuple[Word, Word, Word, Word], NoiseKey]:
    """Counter and key after the first ``count`` rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(count):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> 32) ^ c1 ^ k0, product1 & 0xFFFFFFFF
        c2, c3 = (product0 >> 32) ^ c3 ^ k1, product0 & 0xFFFFFFFF
        k0 = (k0 + _WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + _WEYL[1]) & 0xFFFFFFFF
    return (c0, c1, c2, c3), NoiseKey(k0, k1)


def noise_words(key: NoiseKey, position: int, token_ids: Ids) -> Words:
    """The word k behind the noise of each token: the first word of Philox at counter (position, token id, 0, 0).

    Many words are made by machine code where numba is there (``sampling.kernel``): the same bits, 15 times sooner.

    Args:
        key: of the choice.
        position: of the sampled token in its text, from 0; below 2^32.
        token_ids: [n] whole numbers, each from 0 to 2^32 - 1.

    Returns:
        uint32 [n].
    """
    ids = np.ascontiguousarray(token_ids, np.uint32)
    found = np.empty(len(ids), np.uint32)
    kernel = words_kernel() if len(ids) >= _MANY else None
    if kernel is not None:
        kernel(key.low, key.high, position, ids, found)
        return found
    for start in range(0, len(ids), _BLOCK):
        block = slice(start, start + _BLOCK)
        (_, c1, c2, _), last = _rounds((position, ids[block].astype(np.uint64), 0, 0), key, _ROUNDS - 1)
        found[block] = ((c2 * _MULTIPLIERS[1]) >> 32) ^ c1 ^ last.low  # of the last round only the first word
    return found


def prepare(vocab_size: int) -> None:
    """Loads and compiles what rows of that many logits will need, so that the first of them need not wait for it."""
    if vocab_size >= _MANY:
        words_kernel()


def gumbel(words: Words) -> NDArray[np.float64]:
    """-log(-log(u)) with u = (k + 1/2) / 2^32: standard Gumbel noise, always finite, and greater for a greater k.

    float64 throughout: in float32 u rounds to 1 for great k, and the noise to infinity.
    """
    found = words.astype(np.float64)
    found += 0.5
    found *= 2.0**-32
    for _ in range(2):
        np.log(found, out=found)
        np.negative(found, out=found)
    return found


def least_word(noise: float) -> int:
    """A word such that all words with at least this ``noise`` are at or above it (and few others). May exceed 32 bits."""
    return max(0, int(np.exp(-np.exp(-noise)) * 2.0**32) - 2)
