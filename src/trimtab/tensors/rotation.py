"""Hadamard rotations of the input: they spread outlier channels over all channels, exactly undone by their inverse.

`T = H D / sqrt(n)` with D random signs from a seed. H is a Kronecker product of a base matrix from Paley's
constructions and Sylvester's [[1, 1], [1, -1]], so that sizes such as 12 * 2^k, 20 * 2^k, 28 * 2^k and 44 * 2^k
rotate whole (704 = 44 * 16). Where no such base of up to MAX_BASE rows is known, H is block diagonal with blocks of
the largest power of two that divides n (11008 = 43 * 256: 43 blocks); an odd n gets signs only. `Rotation.block` says
which. Sources: Paley 1933, "On orthogonal matrices"; on weights: QuIP#, arXiv:2402.04396; QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.tensors.transform import Transform

MAX_BASE = 512  # rows of a base; it is applied as a dense matrix
_RADIX = 64  # powers of two are applied as dense factors of at most this many rows


@dataclass(frozen=True)
class Rotation(Transform):
    """An orthogonal transform of vectors of `size` entries, equal on every platform for equal (size, seed).

    seed    of the random signs; None = no signs

    Nothing is stored but size and seed. Raises ConfigError for a size below 1 or a seed outside 0 .. 2^63 - 1.
    """

    kind: ClassVar[str] = "hadamard"

    size: int
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"a rotation of size {self.size} has nothing to rotate; size must be at least 1.")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"rotation seed {self.seed} must be in 0 .. 2^63 - 1, or None for no signs.")

    @property
    def in_features(self) -> int:
        return self.size

    @property
    def width(self) -> int:
        return self.size

    @property
    def block(self) -> int:
        """Entries that are mixed with one another: `size` where a Hadamard matrix is known, else the block length."""
        return int(np.prod(_factors(self.size), dtype=np.int64))

    def apply(self, x: Tensor) -> Tensor:
        """x [..., size] -> T x, in the dtype of x; computed in float32 at least."""
        signed = self._wide(x)
        signs = self._signs(signed)
        return self._mix(signed if signs is None else signed * signs, transpose=False).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """x [..., size] -> T^-1 x = T^t x."""
        mixed = self._mix(self._wide(x), transpose=True)
        signs = self._signs(mixed)
        return (mixed if signs is None else mixed * signs).to(x.dtype)

    def fold(self, weight: Tensor) -> Tensor:
        """`W T`: its rows are T^t applied to the rows of W."""
        return self.inverse(weight)

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """T as a dense [size, size] matrix."""
        return self.inverse(torch.eye(self.size, dtype=torch.float64)).to(dtype)

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": self.size, "seed": self.seed}

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> Rotation:
        """Raises CheckpointError if this is not a rotation's spec, or there are buffers."""
        size, seed = spec.get("size"), spec.get("seed")
        if state or spec.get("kind") != cls.kind or type(size) is not int or not (seed is None or type(seed) is int):
            raise CheckpointError(f"no rotation can be read from {dict(spec)!r}.")
        try:
            return cls(size, seed)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None

    def _wide(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.size:
            raise ConfigError(f"a rotation of size {self.size} cannot act on vectors of shape {list(x.shape)}.")
        return x if x.dtype == torch.float64 else x.float()

    def _signs(self, like: Tensor) -> Tensor | None:
        if self.seed is None:
            return None
        return torch.from_numpy(_signs(self.size, self.seed).copy()).to(like)

    def _mix(self, x: Tensor, transpose: bool) -> Tensor:
        """Apply H / sqrt(block), or its transpose: each Kronecker factor along its own axis."""
        stride = 1
        for rows in reversed(_factors(self.size)):
            factor = torch.from_numpy(_hadamard(rows)).to(x) / rows**0.5
            factor = factor.t() if transpose else factor
            if stride == 1:
                mixed = x.reshape(-1, rows) @ factor.t()
            else:
                mixed = torch.matmul(factor, x.reshape(-1, rows, stride))
            x = mixed.reshape(x.shape)
            stride *= rows
        return x


@functools.lru_cache(maxsize=64)
def _signs(size: int, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """size values +1 or -1: the top bits of the SplitMix64 sequence, which no library version changes."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.where((z ^ (z >> np.uint64(31))) >> np.uint64(63), -1.0, 1.0)


@functools.cache
def _factors(size: int) -> tuple[int, ...]:
    """Orders of the Hadamard matrices whose Kronecker product is H, or one block of H."""
    power = size & -size
    odd = size // power
    base = 1
    if odd > 1:
        orders = (odd << shift for shift in range(2, power.bit_length()))
        base = next((order for order in orders if order <= MAX_BASE and _paley_prime(order)), 1)
    rest = power if base == 1 else size // base
    factors = [base] if base > 1 else []
    while rest > 1:
        factors.append(min(rest, _RADIX))
        rest //= factors[-1]
    return tuple(factors)


def _paley_prime(order: int) -> int:
    """The prime from which Paley's construction makes a Hadamard matrix of this order (a multiple of 4), or 0."""
    if _is_prime(order - 1):
        return order - 1  # order % 4 == 0, so the prime is 3 mod 4: construction I
    half = order // 2 - 1
    return half if half % 4 == 1 and _is_prime(half) else 0  # construction II


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


@functools.cache
def _hadamard(order: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A Hadamard matrix: entries +-1, H H^t = order * I. `order` is a power of two or has a Paley prime."""
    if order & (order - 1) == 0:
        sylvester = np.ones((1, 1))
        while len(sylvester) < order:
            sylvester = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), sylvester)
        return sylvester
    q = _paley_prime(order)
    residues = {i * i % q for i in range(1, q)}
    character = np.array([0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)])
    jacobsthal = character[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    conference = np.zeros((q + 1, q + 1))
    conference[0, 1:] = 1.0
    conference[1:, 1:] = jacobsthal
    if q == order - 1:
        conference[1:, 0] = -1.0  # skew, since q = 3 mod 4
        return np.eye(order) + conference
    conference[1:, 0] = 1.0  # symmetric, since q = 1 mod 4
    plus = np.array([[1.0, 1.0], [1.0, -1.0]])
    minus = np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.kron(conference, plus) + np.kron(np.eye(q + 1), minus)
