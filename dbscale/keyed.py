"""Random numbers that are a pure function of (seed, purpose, epoch, sample): no state, no generator to save.

Any worker, rank or resumed run that asks for the draws of a sample gets the same ones. Augmentation, mixing and the
fractal source draw from here; the order of samples is `order`. SplitMix64's finaliser (Steele, Lea & Flood 2014) is
applied once per key word.
"""

import hashlib
import zlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MUL_1 = np.uint64(0xBF58476D1CE4E5B9)
_MUL_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MUL_1
    x = (x ^ (x >> np.uint64(27))) * _MUL_2
    return x ^ (x >> np.uint64(31))


def _words(values: ArrayLike) -> NDArray[np.uint64]:
    return np.atleast_1d(np.asarray(values, dtype=np.int64)).astype(np.uint64)


def keyed_bits(seed: int, purpose: str, *keys: ArrayLike, num_draws: int) -> NDArray[np.uint64]:
    """uint64 [b, num_draws], one row per entry of the broadcast integer `keys` (scalars or [b])."""
    state = _mix(_words(seed) ^ np.uint64(zlib.crc32(purpose.encode())) << np.uint64(32))
    for key in keys:
        state = _mix(state ^ _words(key))
    counters = np.arange(1, num_draws + 1, dtype=np.uint64) * _GOLDEN
    return _mix(state[:, None] + counters[None, :])


def keyed_uniform(seed: int, purpose: str, *keys: ArrayLike, num_draws: int) -> NDArray[np.float64]:
    """float64 [b, num_draws] in [0, 1), with 53 random bits each; same keys, same numbers, on any machine."""
    return (keyed_bits(seed, purpose, *keys, num_draws=num_draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def frozen_generator(*key: object) -> np.random.RandomState:
    """A generator for permutations, keyed by any values with a stable `str`."""
    # RandomState's streams are frozen by NumPy's compatibility policy (NEP 19); Generator's may change.
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


def derive_seed(seed: int, purpose: str, *keys: int) -> int:
    """63 bits from (seed, purpose, keys), for generators of other libraries: streams of two purposes are independent."""
    text = "\0".join(map(str, (seed, purpose, *keys)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
