"""A weight as packed codes into a table of levels, with one scale per group: `w = scale * level[code]`.

The table has 2^bits values from -1 to 1, and the scale of a group is its largest absolute weight. It is a known table
named in the spec, of which nothing is stored, or one of the matrix' own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from trimtab.core.config import Config
from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.kernels.grid_matmul import GridWeight
from trimtab.kernels.grid_matmul.weight import MAX_LEVEL_BITS
from trimtab.kernels.packing import pack, packed_bytes, unpack
from trimtab.tensors.base import Part, checked_buffers, shape_from_spec, stored_like
from trimtab.tensors.grid_format import SCALE_DTYPES, GridFormat, matrix_shape
from trimtab.tensors.nested_scales import NestedFormat, NestedScales

if TYPE_CHECKING:
    from trimtab.tensors.metric import Metric

_NORMAL_OFFSET = 0.9677083


@functools.cache
def normal_float(bits: int) -> Tensor:
    """The NormalFloat table, float32 [2^bits], ascending from -1 to 1 with an exact 0.

    With p(n) the quantiles of the standard normal distribution at n evenly spaced places from 0.9677083 down to, but
    not at, 0.5: p(2^(b-1)), 0 and -p(2^(b-1) - 1), divided by the largest. QLoRA, arXiv:2305.14314.
    """

    half = 1 << (bits - 1)
    above, below = (torch.linspace(_NORMAL_OFFSET, 0.5, n + 1, dtype=torch.float64)[:-1] for n in (half, half - 1))
    zero = torch.zeros(1, dtype=torch.float64)
    levels = torch.cat([torch.special.ndtri(above), zero, -torch.special.ndtri(below)]).sort().values
    return (levels / levels[-1]).float()


@dataclass(frozen=True, kw_only=True)
class TableFormat(Config):
    """How a table part is laid out.

    bits          bits per code
    group_size    weights of a row that share a scale; must divide the row; -1 = the whole row is one group
    levels        "nf": NormalFloat, not stored. "stored": a table of the matrix' own
    scale_dtype   stored dtype of the scales, unless they are nested
    nested        how the scales are quantized; None: they are stored as they are
    """

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = 64
    levels: Literal["nf", "stored"] = "nf"
    scale_dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    nested: NestedFormat | None = None

    def check(self) -> None:
        self._groups()

    def _groups(self) -> GridFormat:
        """The grid with the same groups; it knows what divides what."""
        return GridFormat(bits=self.bits, group_size=self.group_size)

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(out, groups) for a matrix of this [out, in] shape. Raises ConfigError if groups do not fill the rows."""
        return self._groups().parameter_shape(shape)

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        """The spec of a LevelTable of this [out, in] shape."""
        return {"kind": LevelTable.kind, "shape": list(shape), **self.to_dict()}


@dataclass(frozen=True, eq=False)
class LevelTable(Part):
    """Packed codes, scales per group, a table of levels.

    packed            uint8 [out, packed_bytes(in, bits)], each row packed on its own (trimtab.kernels.packing)
    stored_scales     [out, groups] in `format.scale_dtype`, or nested; never negative
    stored_levels     float32 [2^bits] in any order; None for a table that is known by name
    """

    kind: ClassVar[str] = "table"

    format: TableFormat
    in_features: int
    packed: Tensor
    stored_scales: Tensor | NestedScales
    stored_levels: Tensor | None = None

    @classmethod
    def quantize(cls, weight: Tensor, fmt: TableFormat, levels: Tensor | None = None) -> LevelTable:
        """Nearest codes of `weight` [out, in] for scales max|w| per group, as they are stored.

        `levels` float32 [2^bits] is given exactly if the format stores them. A group of zeros has the scale 0. Raises
        ConfigError for what does not fit, NumericsError for NaN, infinity or a scale beyond its dtype.
        """
        shape = matrix_shape(weight)
        if (levels is None) != (fmt.levels == "nf"):
            raise ConfigError(f"levels={fmt.levels!r}: a table is given exactly if the format stores one.")
        if levels is not None and (tuple(levels.shape) != (1 << fmt.bits,) or levels.dtype != torch.float32):
            raise ConfigError(f"levels are {levels.dtype} {list(levels.shape)}; want float32 [{1 << fmt.bits}].")
        values = weight.float()
        _refuse_non_finite(values)
        absmax = values.reshape(*fmt.scale_shape(shape), -1).abs().amax(dim=2)
        scales = absmax.to(SCALE_DTYPES[fmt.scale_dtype]) if fmt.nested is None else absmax
        if not bool(torch.isfinite(scales).all()):
            raise NumericsError(
                f"the largest weight of a {list(shape)} matrix, {float(absmax.max()):.4g}, is beyond "
                f"{fmt.scale_dtype}. Use scale_dtype='bfloat16' or 'float32', or look for a broken weight."
            )
        empty = torch.empty(shape[0], 0, dtype=torch.uint8, device=weight.device)
        nested = scales if fmt.nested is None else NestedScales.quantize(scales, fmt.nested)
        form = cls(fmt, shape[1], empty, nested, levels)
        return replace(form, packed=pack(form._nearest(values, None)[0], fmt.bits))

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.packed.shape[0]), self.in_features

    @functools.cached_property
    def scales(self) -> Tensor:
        """[out, groups]; nested ones expanded to float32, once, and kept: 32 bits per group while the part lives."""
        stored = self.stored_scales
        return stored.values() if isinstance(stored, NestedScales) else stored

    @functools.cached_property
    def levels(self) -> Tensor:
        """The table, float32 [2^bits], on the device of the codes."""
        if self.stored_levels is not None:
            return self.stored_levels
        return normal_float(self.format.bits).to(self.packed.device)

    def codes(self) -> Tensor:
        """Unpacked codes, uint8 [out, in]."""
        return unpack(self.packed, self.format.bits, self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._values(self.scales, self.levels).to(dtype)

    def grid_weight(self) -> GridWeight | None:
        """None beyond 4 bits."""
        if self.format.bits > MAX_LEVEL_BITS:
            return None
        group = self.in_features if self.format.group_size == -1 else self.format.group_size
        return GridWeight(
            self.packed, self.scales, None, self.format.bits, group, self.in_features, self.levels.contiguous()
        )

    def project(
        self, target: Tensor, metric: Metric | None = None, subset: Tensor | None = None, *, differ: bool = False
    ) -> LevelTable:
        """Nearest levels to `target` with scales and table kept. As for grids, `metric` changes nothing."""
        if tuple(target.shape) != self.shape:
            raise ConfigError(f"target of shape {list(target.shape)} for a table part of shape {list(self.shape)}.")
        values = target.float()
        _refuse_non_finite(values)
        old = self.codes()
        nearest, second = self._nearest(values, old)
        codes = torch.where(nearest == old, second, nearest) if differ else nearest
        if subset is not None:
            codes = torch.where(subset, codes, old)
        return replace(self, packed=pack(codes, self.format.bits))

    def _nearest(self, values: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes uint8 [out, in] of the level nearest to each value, and of the second nearest if `old` is given.

        Boundaries are the midpoints of neighbouring levels; a value on one takes the lower. Groups of scale 0 take the
        level nearest to 0.
        """
        levels, order = self.levels.sort()
        scales = self.scales.float()[:, :, None]
        grouped = values.reshape(*self.scales.shape, -1)
        ratios = torch.where(scales > 0, grouped / scales, 0.0).reshape(values.shape)
        place = torch.bucketize(ratios, (levels[1:] + levels[:-1]) / 2)
        nearest = order[place].to(torch.uint8)
        if old is None:
            return nearest, nearest
        below, above = (place - 1).clamp(min=0), (place + 1).clamp(max=len(levels) - 1)
        nearer = (ratios - levels[below]).abs() <= (ratios - levels[above]).abs()
        first, last = place == 0, place == len(levels) - 1
        return nearest, order[torch.where((nearer & ~first) | last, below, above)].to(torch.uint8)

    def _values(self, scales: Tensor, levels: Tensor) -> Tensor:
        looked_up = levels.float()[self.codes().long()].reshape(*scales.shape, -1)
        return (looked_up * scales.float()[:, :, None]).reshape(self.shape)

    def continuous(self) -> dict[str, Tensor]:
        """Scales, or the numbers of nested ones, and levels if they are stored."""
        return {name: value for name, value in self.state().items() if value.is_floating_point()}

    def dense(self, continuous: Mapping[str, Tensor]) -> Tensor:
        nested = self.stored_scales
        scales = nested.dense(continuous) if isinstance(nested, NestedScales) else continuous["scales"]
        return self._values(scales, continuous.get("levels", self.levels))

    def with_continuous(self, continuous: Mapping[str, Tensor]) -> LevelTable:
        """Raises NumericsError also for scales, maxima or an offset below zero."""
        changed = self.from_state(self.spec(), self.state() | stored_like(self, continuous))
        try:
            changed.check()
        except CheckpointError as error:
            raise NumericsError(f"trained numbers cannot be stored: {error}") from None
        return changed

    def spec(self) -> dict[str, Any]:
        return self.format.spec(self.shape)

    def state(self) -> dict[str, Tensor]:
        scales = self.stored_scales
        state = {
            "codes": self.packed,
            **(scales.state() if isinstance(scales, NestedScales) else {"scales": scales}),
        }
        return state if self.stored_levels is None else state | {"levels": self.stored_levels}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape, fmt = shape_from_spec(spec), cls._format(spec)
        try:
            scales = fmt.scale_shape(shape)
        except ConfigError as error:
            raise CheckpointError(f"table part: {error}") from None
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((shape[0], packed_bytes(shape[1], fmt.bits)), torch.uint8)
        }
        if fmt.nested is None:
            wanted["scales"] = (scales, SCALE_DTYPES[fmt.scale_dtype])
        else:
            wanted |= NestedScales.buffers(fmt.nested, scales)
        return wanted | {"levels": ((1 << fmt.bits,), torch.float32)} if fmt.levels == "stored" else wanted

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> LevelTable:
        found, fmt, shape = checked_buffers(cls, spec, state), cls._format(spec), shape_from_spec(spec)
        scales: Tensor | NestedScales
        if fmt.nested is None:
            scales = found["scales"]
        else:
            scales = NestedScales.from_state(fmt.nested, fmt.scale_shape(shape), found)
        return cls(fmt, shape[1], found["codes"], scales, found.get("levels"))

    @staticmethod
    def _format(spec: Mapping[str, Any]) -> TableFormat:
        try:
            return TableFormat.from_options({k: v for k, v in spec.items() if k not in ("kind", "shape")})
        except ConfigError as error:
            raise CheckpointError(f"table part: {error}") from None

    def check(self) -> None:
        """Raise CheckpointError if a scale is negative or not finite, or a stored level is not finite."""
        if isinstance(self.stored_scales, NestedScales):
            self.stored_scales.check()
        else:
            bad = ~(torch.isfinite(self.stored_scales) & (self.stored_scales >= 0))
            if bool(bad.any()):
                row, group = bad.nonzero()[0].tolist()
                raise CheckpointError(
                    f"table part of shape {list(self.shape)}: {int(bad.sum())} scales are negative or not finite, the "
                    f"first is scales[{row}, {group}] = {float(self.stored_scales[row, group])}."
                )
        if self.stored_levels is not None and not bool(torch.isfinite(self.stored_levels).all()):
            raise CheckpointError(f"table part of shape {list(self.shape)}: levels have NaN or infinity.")


def _refuse_non_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NumericsError(f"a weight of shape {list(values.shape)} to be quantized has NaN or infinite values.")
