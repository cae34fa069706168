"""Which options of the codec exclude each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels.kv_attention.run import CODE_BITS

if TYPE_CHECKING:
    from trimtab.tensors.kv.codec import KVCodec


def check_options(codec: KVCodec) -> None:
    """Raise ConfigError, naming the options and their values, if they do not hold together."""
    if codec.order is not None and codec.order.dtype != torch.int16:
        raise ConfigError(f"order is {codec.order.dtype}; channels are numbered in int16.")
    if codec.order is not None and codec.order.sort().values.tolist() != list(range(codec.order.numel())):
        raise ConfigError(
            f"order is no permutation of 0 ... {codec.order.numel() - 1}: it begins {_begin(codec.order)}."
        )
    if codec.hadamard and (codec.hadamard < 2 or codec.hadamard & (codec.hadamard - 1)):
        raise ConfigError(f"hadamard={codec.hadamard} is not 0 or a power of two.")
    if codec.bits == 0:
        _exact(codec)
    elif codec.coupled > 1 or codec.codebook is not None:
        _coupled(codec)
    else:
        _single(codec)


def _exact(codec: KVCodec) -> None:
    unused = [name for name in (*_GRID, *_AFTER, "hadamard", "order", "codebook") if _is_set(codec, name)]
    if unused or codec.coupled > 1:
        raise ConfigError(f"bits=0 stores exact numbers, for which {_named(unused or ['coupled'])} means nothing.")


def _coupled(codec: KVCodec) -> None:
    if codec.codebook is None or codec.coupled < 2:
        raise ConfigError(f"coupled={codec.coupled} channels need a codebook, and a codebook at least 2 of them.")
    if codec.codebook.dtype != torch.float16:
        raise ConfigError(f"the codebook is {codec.codebook.dtype}; it is stored in float16: round it before.")
    narrow = codec.bits in CODE_BITS
    if not narrow and codec.bits - 8 not in CODE_BITS:
        widths = sorted({*CODE_BITS, *(8 + bits for bits in CODE_BITS)})
        raise ConfigError(f"codes of coupled channels have {', '.join(map(str, widths))} bits, not {codec.bits}.")
    unused = [name for name in (*_GRID, *_AFTER) if _is_set(codec, name)]
    if unused:
        raise ConfigError(f"coupled channels have neither groups nor what follows: {_named(unused)} means nothing.")


def _single(codec: KVCodec) -> None:
    if codec.bits not in CODE_BITS:
        raise ConfigError(f"bits={codec.bits}; codes of one channel have 0, {', '.join(map(str, CODE_BITS))} bits.")
    if (codec.scale is None) != (codec.minimum is None):
        raise ConfigError("fixed groups need both scale and minimum.")
    groupings = [bool(codec.group_tokens), bool(codec.group_channels), codec.scale is not None]
    if sum(groupings) != 1:
        raise ConfigError(
            f"group_tokens={codec.group_tokens}, group_channels={codec.group_channels} and fixed scales "
            f"{'given' if groupings[2] else 'not given'}: choose exactly one of the three."
        )
    g = codec.group_tokens
    if g != -1 and (g < 0 or g % 16):
        raise ConfigError(f"group_tokens={g}; groups have a multiple of 16 tokens, or -1: all of the block.")
    if codec.group_channels < -1:
        raise ConfigError(f"group_channels={codec.group_channels}; -1 means all of them.")
    for name in ("scale", "minimum"):
        fixed = getattr(codec, name)
        if fixed is not None and fixed.dtype != torch.float16:
            raise ConfigError(f"{name} is {fixed.dtype}; it is stored in float16: round it before.")
    _tables(codec)
    if not 0 < codec.clip <= 1 or (codec.clip != 1 and codec.scale is not None):
        raise ConfigError(f"clip={codec.clip} must be above 0 and at most 1, and 1 with fixed scales.")
    if codec.range_rule not in ("minmax", "quantile"):
        raise ConfigError(f"range_rule={codec.range_rule!r} is neither 'minmax' nor 'quantile'.")
    if codec.range_rule == "quantile" and (codec.outliers is None or not codec.outliers.fraction):
        raise ConfigError("range_rule='quantile' takes the range beside outliers by fraction: give such outliers.")
    if codec.rank < 0 or (codec.prefill_rank or 0) < 0 or codec.iterations < 1:
        raise ConfigError(
            f"rank={codec.rank} and prefill_rank={codec.prefill_rank} must not be negative, "
            f"iterations={codec.iterations} at least 1."
        )


def _tables(codec: KVCodec) -> None:
    if codec.decode_levels is not None and codec.levels is None:
        raise ConfigError("decode_levels without levels: codes must be chosen by some table.")
    for name in ("levels", "decode_levels"):
        table = getattr(codec, name)
        if table is None:
            continue
        if table.dtype != torch.float32 or tuple(table.shape) != (1 << codec.bits,):
            raise ConfigError(f"{name} is {table.dtype} {list(table.shape)}; want float32 [{1 << codec.bits}].")
        if not bool((table.diff() >= 0).all()):
            raise ConfigError(f"{name} must ascend: {table.tolist()}.")


_GRID = ("group_tokens", "group_channels", "levels", "decode_levels", "scale", "minimum", "clip", "range_rule")
_AFTER = ("outliers", "rank", "prefill_rank")
_ABSENT = {"clip": 1.0, "range_rule": "minmax", "group_tokens": 0, "group_channels": 0, "rank": 0, "hadamard": 0}


def _is_set(codec: KVCodec, name: str) -> bool:
    value, absent = getattr(codec, name), _ABSENT.get(name)
    return value is not None if absent is None else bool(value != absent)


def _begin(order: Tensor) -> str:
    return ", ".join(map(str, order.flatten()[:8].tolist()))


def _named(options: list[str]) -> str:
    return ", ".join(options)
