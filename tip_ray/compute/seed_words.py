"""numpy.random.SeedSequence for many seeds at once, bit for bit.

R  seeds

One object a seed costs some 8 us, most of a step's time where rollouts are short. The algorithm is
O'Neill's seed_seq_fe, and NumPy's documentation promises that SeedSequence stays as it is (NEP 19).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

_POOL_WORDS = 4
_LOW_HALF = 0xFFFFFFFF

Words = npt.NDArray[np.uint32]


def generators(seeds: Sequence[int]) -> Iterator[np.random.Generator]:
    """The same as Generator(PCG64(seed)) of each seed from 0 to 2^64 - 1."""
    for words in seed_words(seeds):
        # NumPy's annotations leave out ISeedSequence, which its documentation allows here.
        yield np.random.Generator(np.random.PCG64(_Words(words)))  # type: ignore[arg-type]


def seed_words(seeds: Sequence[int]) -> npt.NDArray[np.uint64]:
    """[R, 4]: row i is SeedSequence(seeds[i]).generate_state(4, uint64)."""
    seeds_R = np.asarray(seeds, np.uint64)
    words_R2 = [(seeds_R & _LOW_HALF).astype(np.uint32), (seeds_R >> 32).astype(np.uint32)]
    nothing_R = np.zeros(len(seeds_R), np.uint32)
    hashed = _hasher(0x43B0D7E5, 0x931E8875)
    pool = [hashed(word_R) for word_R in (*words_R2, nothing_R, nothing_R)]
    for source in range(_POOL_WORDS):
        for place in range(_POOL_WORDS):
            if place != source:
                pool[place] = _mixed(pool[place], hashed(pool[source]))
    hashed = _hasher(0x8B51F9DD, 0x58F38DED)
    state_R8 = np.stack([hashed(pool[place % _POOL_WORDS]) for place in range(8)], axis=1)
    return state_R8.view(np.uint64)


def _hasher(constant: int, multiplier: int) -> Callable[[Words], Words]:
    """A hash of 32-bit words that is another one at each call."""

    def hashed(word_R: Words) -> Words:
        nonlocal constant
        word_R = word_R ^ np.uint32(constant)
        constant = constant * multiplier & _LOW_HALF
        word_R = word_R * np.uint32(constant)
        return _folded(word_R)

    return hashed


def _mixed(one_R: Words, other_R: Words) -> Words:
    return _folded(one_R * np.uint32(0xCA01F9DD) - other_R * np.uint32(0x4973F715))


def _folded(word_R: Words) -> Words:
    return word_R ^ (word_R >> np.uint32(16))


class _Words(ISeedSequence):
    """What a bit generator asks its seed for, made beforehand."""

    def __init__(self, words: npt.NDArray[np.uint64]) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[np.uint64]:
        if (n_words, np.dtype(dtype)) != (len(self._words), np.dtype(np.uint64)):
            raise ValueError(f"seed words: asked for {n_words} {dtype}, made for PCG64's 4 uint64")
        return self._words
