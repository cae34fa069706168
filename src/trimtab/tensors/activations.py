"""Rounding of a layer's input to an integer grid: per token as it comes, or with steps fixed beforehand.

static     the producer (a norm whose weight was divided by the channels' steps) already delivers x / s, so integers
           are `clip(round(x), -m, m)` with m = 2^(bits-1) - 1; no statistic of x is taken at run time
token      per token, symmetric: s = max|x| / m, integers as above; asymmetric: s = (max - min) / (2^bits - 1),
           z = round(-min / s), integers `clip(round(x / s) + z, 0, 2^bits - 1)`; the value is `s (integer - z)`

Rounding is half to even, and a token of zeros stays zero. Asymmetric steps are at least 1e-5 and at most 1e4, as in
QLLM's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.tensors.transform import Buffers, Transform

_SMALLEST_STEP, _LARGEST_STEP = 1e-5, 1e4


@dataclass(frozen=True, eq=False)
class ActivationGrid(Transform):
    """x [..., size] -> the values of its integers [..., width], in the dtype of x.

    size       entries of the input
    bits       of the integers: 4, 6 or 8
    mode       "static" or "token", see the module
    symmetric  of mode "token"; "static" always is
    index      int32 [width]: which integer stands at each place of the result (a split channel repeats its own);
               None: all, in order

    Raises ConfigError for options that do not go together or an index out of range.
    """

    kind: ClassVar[str] = "activations"

    size: int
    bits: int = 4
    mode: Literal["static", "token"] = "token"
    symmetric: bool = True
    index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or self.bits not in (4, 6, 8) or self.mode not in ("static", "token"):
            raise ConfigError(
                f"an activation grid of size={self.size}, bits={self.bits}, mode={self.mode!r} cannot be; "
                "bits are 4, 6 or 8, the mode is 'static' or 'token'."
            )
        if self.mode == "static" and not self.symmetric:
            raise ConfigError("a static activation grid is symmetric; use mode='token' for zero points.")
        if self.index is not None and (self.index.ndim != 1 or self.index.dtype != torch.int32):
            raise ConfigError(f"index is {self.index.dtype} {list(self.index.shape)}, must be int32 [width].")

    @property
    def in_features(self) -> int:
        return self.size

    @property
    def width(self) -> int:
        return self.size if self.index is None else int(self.index.shape[0])

    @property
    def largest(self) -> int:
        """The largest symmetric integer, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Integers float32 [..., width] of x, with steps and zero points [..., 1]; None: 1, and 0."""
        wide = x.float()
        step = zero = None
        if self.mode == "static":
            codes = wide.round().clamp(-self.largest, self.largest)
        elif self.symmetric:
            step = wide.abs().amax(-1, keepdim=True) / self.largest
            step = torch.where(step == 0, 1.0, step)
            codes = (wide / step).round().clamp(-self.largest, self.largest)
        else:
            levels = (1 << self.bits) - 1
            low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
            step = ((high - low) / levels).clamp(_SMALLEST_STEP, _LARGEST_STEP)
            zero = (-low / step).round()
            codes = ((wide / step).round() + zero).clamp(0, levels)
        return codes if self.index is None else codes[..., self.index.long()], step, zero

    def apply(self, x: Tensor) -> Tensor:
        codes, step, zero = self.integers(x)
        values = codes if zero is None else codes - zero
        return (values if step is None else values * step).to(x.dtype)

    def fold(self, weight: Tensor) -> Tensor:
        if self.index is None:
            return weight
        return weight.new_zeros(weight.shape[0], self.size).index_add_(1, self.index.long(), weight)

    def spec(self) -> dict[str, Any]:
        width = None if self.index is None else self.width
        return {
            "kind": self.kind,
            "size": self.size,
            "bits": self.bits,
            "mode": self.mode,
            "symmetric": self.symmetric,
            "width": width,
        }

    def state(self) -> dict[str, Tensor]:
        return {} if self.index is None else {"index": self.index}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> Buffers:
        width = spec.get("width")
        if width is None:
            return {}
        if type(width) is not int or width < 1:
            raise CheckpointError(f"activation grid: 'width' must be a count or null, not {width!r}.")
        return {"index": ((width,), torch.int32)}

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> ActivationGrid:
        if set(state) != set(cls.buffers(spec)):
            raise CheckpointError(f"activation grid: buffers {sorted(state)}, expected {sorted(cls.buffers(spec))}.")
        fields = {name: spec.get(name) for name in ("size", "bits", "mode", "symmetric")}
        if not all(type(fields[n]) is t for n, t in (("size", int), ("bits", int), ("mode", str), ("symmetric", bool))):
            raise CheckpointError(f"no activation grid can be read from {dict(spec)!r}.")
        return cls(**fields, index=state.get("index"))  # type: ignore[arg-type]

    def check(self) -> None:
        if self.index is not None and (int(self.index.min()) < 0 or int(self.index.max()) >= self.size):
            raise CheckpointError(
                f"activation grid: indices {int(self.index.min())} .. {int(self.index.max())} for {self.size} inputs."
            )
