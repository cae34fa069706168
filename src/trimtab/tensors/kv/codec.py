"""The one codec of cached keys and values. Each method (KIVI, GEAR, KVQuant, CQ, RotateKV) is a choice of components.

Encoding a block, in this order (every step may be absent); `reference.decode` undoes it from the last to the first:

    overridden tokens     stored exactly, and replaced by the mean of the others, so that they spoil no group
    rotation              Hadamard transform over blocks of channels, then the order of channels
    outliers              single entries stored exactly and taken out
    groups                minimum and scale, rounded to float16 *before* codes are computed
    codes                 nearest step of a uniform grid, nearest level of a table, or nearest centroid
    low rank              of the error that is left, per head; zero at outliers

A block is encoded on its own and a run never changes. Where groups are fixed, lie in one token, or divide the block,
encoding a stream block by block gives the codes of encoding it at once, bit for bit; groups over the whole block,
outliers along tokens and low rank belong to their block. Factors are stored in float16 only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.kernels.kv_attention.codes import pack_channels
from trimtab.kernels.kv_attention.run import EXACT_DTYPES, TILE, Run, tiles
from trimtab.tensors.kv import grid
from trimtab.tensors.kv.codebook import nearest_centroid
from trimtab.tensors.kv.low_rank import low_rank
from trimtab.tensors.kv.options import check_options
from trimtab.tensors.kv.outliers import OutlierRule, outlier_rows
from trimtab.tensors.kv.rotation import hadamard_channels

_Rows = dict[str, Any]
"""Field of a run -> its tensors, one for each row of the batch: a tensor with rows first, or a sequence."""


@dataclass(frozen=True, eq=False, kw_only=True)
class KVCodec:
    """How one layer's keys, or its values, are stored.

    bits            of a code; 0 stores the numbers themselves, and then no other option is set
    group_tokens    groups over g tokens of a channel, a multiple of 16; -1: all tokens of the block
    group_channels  groups over g channels of a token, heads one after the other; -1: all H d
    levels          ascending float32 [2^bits], from about -1 to 1: a table instead of the uniform grid
    decode_levels   like levels: what codes stand for when they are read (Q-Norm); None: levels
    scale, minimum  float16 [H, 1, d]: fixed groups, one per channel, instead of measured ones (KVQuant's keys)
    clip            rho: groups span rho * min ... rho * max (RotateKV); beyond it codes saturate
    range_rule      "minmax"; "quantile": with outliers by fraction, floor(n fraction / 2) + 1 per side are outliers and
                    the next one is the limit of the range (KVQuant's values)
    outliers        see OutlierRule
    rank            of the error that is kept per head; prefill_rank: in blocks of a prompt, None = rank
    iterations      of the power iteration
    codebook        float16 [H, d / coupled, 2^bits, coupled]: one code for `coupled` neighbouring channels (CQ)
    hadamard        channels in a Hadamard block, a power of two; 0: none
    order           int16 [H d], a permutation: channel order[r] of the rotated ones is stored as row r

    Raises ConfigError for options that exclude each other; `check_shape` for those that do not fit a model.
    """

    bits: int
    group_tokens: int = 0
    group_channels: int = 0
    levels: Tensor | None = None
    decode_levels: Tensor | None = None
    scale: Tensor | None = None
    minimum: Tensor | None = None
    clip: float = 1.0
    range_rule: str = "minmax"
    outliers: OutlierRule | None = None
    rank: int = 0
    prefill_rank: int | None = None
    iterations: int = 3
    coupled: int = 1
    codebook: Tensor | None = None
    hadamard: int = 0
    order: Tensor | None = None

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def cut_anywhere(self) -> bool:
        """Encoding block by block gives the codes of encoding all at once, if groups of tokens divide blocks."""
        along_tokens = self.outliers is not None and bool(self.outliers.fraction) and self.outliers.along == "tokens"
        return not (self.rank or self.prefill_rank or self.group_tokens == -1 or along_tokens)

    def check_shape(self, heads: int, head_dim: int) -> None:
        """Raise ConfigError if keys or values of `heads` heads of size `head_dim` cannot be stored so."""
        channels = heads * head_dim
        where = f"{heads} KV heads of size {head_dim}"
        if self.group_channels > 0 and channels % self.group_channels:
            raise ConfigError(f"groups of {self.group_channels} channels do not divide {where} = {channels} channels.")
        if self.hadamard and channels % self.hadamard:
            raise ConfigError(f"a Hadamard transform of {self.hadamard} does not divide {where} = {channels} channels.")
        if head_dim % self.coupled:
            raise ConfigError(f"{self.coupled} coupled channels do not divide the head size {head_dim}.")
        if max(self.rank, self.prefill_rank or 0) > head_dim:
            raise ConfigError(f"rank {max(self.rank, self.prefill_rank or 0)} exceeds the head size {head_dim}.")
        if self.outliers is not None and head_dim * TILE > 1 << 16:
            raise ConfigError(f"outliers need a head size of at most {(1 << 16) // TILE}, not {head_dim}.")
        wanted = {
            "scale": (heads, 1, head_dim),
            "minimum": (heads, 1, head_dim),
            "order": (channels,),
            "codebook": (heads, head_dim // self.coupled, 1 << self.bits, self.coupled),
        }
        found = {name: getattr(self, name) for name in wanted}
        if self.outliers is not None:
            wanted |= {"lower": (heads, head_dim)}
            found |= {"lower": self.outliers.lower}
        for name, shape in wanted.items():
            if found[name] is not None and tuple(found[name].shape) != shape:
                raise ConfigError(f"{name} has shape {list(found[name].shape)}; {where} need {list(shape)}.")

    def encode(
        self,
        x: Tensor,
        *,
        first_position: Sequence[int] | None = None,
        prefill: bool = False,
        override_tokens: Sequence[Tensor | None] | None = None,
        override_values: Sequence[Tensor | None] | None = None,
    ) -> list[Run]:
        """x [R, H, m, d], m >= 1 -> one run per row of the batch; their tensors are slices of common storages.

        first_position     per row, if x are keys before rotary embedding
        prefill            whether this block is of a prompt: `prefill_rank` instead of `rank`
        override_tokens    per row int [p] ascending, or None: tokens that are stored exactly
        override_values    per row [H, p, d]; None: those of x, which needs x without first_position, because overrides
                           are stored after rotary embedding

        Raises ConfigError for what does not fit, NumericsError for NaN or infinity.
        """
        self._check_input(x)
        rows, heads, tokens, dim = x.shape
        overrides = _overrides(x, first_position, override_tokens, override_values)
        batched: _Rows
        shared: dict[str, Any] = {}
        if not self.bits:
            batched = {"exact": x.clone(memory_format=torch.contiguous_format).unbind(0)}
        else:
            y = self._channels_first(x, [one.get("override_tokens") for one in overrides])
            batched, shared = self._encode_coupled(y, x.shape) if self.coupled > 1 else self._encode(y, x, prefill)
        positions = [None] * rows if first_position is None else list(first_position)
        return [
            Run(
                tokens=tokens,
                heads=heads,
                head_dim=dim,
                first_position=positions[row],
                bits=self.bits,
                coupled=self.coupled,
                hadamard=self.hadamard,
                order=self.order,
                **shared,
                **{name: tensors[row] for name, tensors in batched.items()},
                **overrides[row],
            )
            for row in range(rows)
        ]

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 4 or 0 in x.shape:
            raise ConfigError(f"encode wants rows of tokens [R, H, m, d], at least one of each, not {list(x.shape)}.")
        if x.dtype not in EXACT_DTYPES:
            raise ConfigError(f"encode wants float32, float16 or bfloat16, not {x.dtype}.")
        self.check_shape(int(x.shape[1]), int(x.shape[3]))

    def _channels_first(self, x: Tensor, overridden: Sequence[Tensor | None]) -> Tensor:
        """y [R, H d, P] float32, rotated; P >= m is whole tiles and groups, filled with copies of the last token."""
        rows, heads, tokens, dim = x.shape
        step = math.lcm(TILE, max(self.group_tokens, 1))
        y = torch.empty((rows, heads, dim, -(-tokens // step) * step), dtype=torch.float32, device=x.device)
        y[..., :tokens] = x.transpose(2, 3)
        if not math.isfinite(float(y[..., :tokens].amin()) + float(y[..., :tokens].amax())):
            raise NumericsError(f"keys or values {list(x.shape)} to be stored have NaN or infinite entries.")
        for row, places in enumerate(overridden):
            if places is not None:
                kept = torch.ones(tokens, dtype=torch.bool, device=x.device)
                kept[places.long()] = False
                mean = y[row, ..., :tokens][..., kept].mean(-1, keepdim=True).nan_to_num(0.0)
                y[row].index_copy_(-1, places.long(), mean.expand(-1, -1, len(places)))
        y[..., tokens:] = y[..., tokens - 1 : tokens]
        y = y.flatten(1, 2)
        if self.hadamard:
            y = hadamard_channels(y, self.hadamard)
        return y if self.order is None else y[:, self.order.long()]

    def _encode(self, y: Tensor, x: Tensor, prefill: bool) -> tuple[_Rows, dict[str, Any]]:
        """Codes of single channels: the tensors of all rows, and what they share. Overwrites y."""
        rows, heads, tokens, dim = x.shape
        batched: _Rows = {}
        flat = None
        if self.outliers is not None:
            flat, values = self.outliers.split_(y, tokens, quantile=self.range_rule == "quantile")
            y[..., tokens:] = y[..., tokens - 1 : tokens]
            kept_in = torch.float16 if x.dtype == torch.float32 else x.dtype
            stored = outlier_rows(flat, values, (rows, heads, dim, y.shape[2]), tiles(tokens), kept_in)
            batched |= dict(zip(("outlier_starts", "outlier_places", "outlier_values"), stored, strict=True))

        group_tokens, group_channels = self._groups(heads, tokens, dim)
        shared: dict[str, Any] = {"group_tokens": group_tokens, "group_channels": group_channels}
        groups, members = grid.grouped(y, group_tokens=group_tokens, group_channels=group_channels)
        steps = None if self.levels is not None else (1 << self.bits) - 1
        if self.scale is not None and self.minimum is not None:
            minimum, scale = (fixed.reshape(-1, 1, 1) for fixed in (self.minimum, self.scale))
            shared |= {"minimum": self.minimum, "scale": self.scale}
        else:
            low, high = groups.amin(members, keepdim=True), groups.amax(members, keepdim=True)
            minimum, scale = grid.range_parameters(low * self.clip, high * self.clip, steps)
            for name, found in (("minimum", minimum), ("scale", scale)):
                batched[name] = self._stored(found.squeeze(members), heads, tokens, group_tokens)

        rank = self.rank if self.prefill_rank is None or not prefill else self.prefill_rank
        grid.normalise_(groups, minimum, scale)
        table = self.levels if self.decode_levels is None else self.decode_levels
        if self.levels is None:
            codes = grid.nearest_step(y, (1 << self.bits) - 1, keep=rank > 0)
        else:
            codes = grid.nearest_level(y, self.levels)
            shared["levels"] = table
        codes[..., tokens:] = 0
        batched["codes"] = self._packed(torch.unflatten(codes, 1, (heads, dim)), tokens, self.bits)
        if rank:
            y -= codes if table is None else table[codes.int()]
            groups *= scale
            if flat is not None:
                y.view(-1)[flat] = 0.0
            a, b = low_rank(torch.unflatten(y, 1, (heads, dim)).flatten(0, 1)[..., :tokens], rank, self.iterations)
            a = torch.nn.functional.pad(a, (0, tiles(tokens) * TILE - tokens))
            batched |= {
                "token_factors": torch.unflatten(a, 0, (rows, heads)),
                "channel_factors": torch.unflatten(b, 0, (rows, heads)),
            }
        return batched, shared

    def _encode_coupled(self, y: Tensor, shape: Sequence[int]) -> tuple[_Rows, dict[str, Any]]:
        """Codes of coupled channels: the nearest centroid, unweighted."""
        assert self.codebook is not None
        rows, heads, tokens, dim = shape
        points = torch.unflatten(y, 1, (-1, self.coupled)).permute(1, 0, 3, 2).flatten(1, 2)  # [groups, R P, c]
        found = nearest_centroid(points, self.codebook.flatten(0, 1).float())
        codes = found.view(heads, dim // self.coupled, rows, -1).permute(2, 0, 1, 3).contiguous()
        codes[..., tokens:] = 0
        batched: _Rows = {"codes": self._packed((codes & 255).to(torch.uint8), tokens, min(self.bits, 8))}
        if self.bits > 8:
            batched["high_codes"] = self._packed((codes >> 8).to(torch.uint8), tokens, self.bits - 8)
        return batched, {"codebook": self.codebook}

    def _groups(self, heads: int, tokens: int, dim: int) -> tuple[int, int]:
        if self.scale is not None or self.group_tokens == -1:
            return tiles(tokens) * TILE, 0
        return self.group_tokens, heads * dim if self.group_channels == -1 else self.group_channels

    def _stored(self, parameters: Tensor, heads: int, tokens: int, group_tokens: int) -> Tensor:
        """Group parameters as runs have them: [R, C, P / g] -> [R, H, ceil(m / g), d], or [R, C / g, P] -> 32 T."""
        if not group_tokens:
            return parameters[..., : tiles(tokens) * TILE].contiguous()
        by_head = torch.unflatten(parameters[..., : -(-tokens // group_tokens)], 1, (heads, -1))
        return by_head.transpose(2, 3).contiguous()

    def _packed(self, codes: Tensor, tokens: int, bits: int) -> Tensor:
        return pack_channels(codes[..., : tiles(tokens) * TILE].contiguous(), bits)


def _overrides(
    x: Tensor,
    first_position: Sequence[int] | None,
    tokens: Sequence[Tensor | None] | None,
    values: Sequence[Tensor | None] | None,
) -> list[dict[str, Any]]:
    """Fields of the run of each row for its overridden tokens."""
    if tokens is None:
        return [{} for _ in x]
    found: list[dict[str, Any]] = []
    for row, places in enumerate(tokens):
        if places is None or places.numel() == 0:
            found.append({})
            continue
        exact = None if values is None else values[row]
        if exact is None:
            if first_position is not None:
                raise ConfigError("overridden tokens of keys before rotary embedding need override_values, rotated.")
            exact = x[row][:, places.long()]
        if tuple(exact.shape) != (x.shape[1], len(places), x.shape[3]):
            wanted = [x.shape[1], len(places), x.shape[3]]
            raise ConfigError(f"override_values of row {row} have shape {list(exact.shape)}, not {wanted}.")
        found.append({"override_tokens": places.to(torch.int32), "override_values": exact.contiguous()})
    return found
