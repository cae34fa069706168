"""What the Triton backends of all operations share: whether they run here, what they refuse, how work is cut up."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kernels import refusals
from trimtab.kernels.packing import LANES, codes_per_lane, words_per_lane

_MAX_SPLITS = 16


def interpreted() -> bool:
    """Whether Triton interprets its programs, on the CPU: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def absent() -> str | None:
    """Why Triton kernels cannot run on this machine, or None."""
    if not interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 interprets Triton kernels, slowly, on the CPU)"
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed"
    return None


def refused(
    tensors: Mapping[str, Tensor | None], floats: Collection[str], *, strided: Collection[str] = ("x",)
) -> str | None:
    """`refusals.refused` for Triton kernels: tensors must be on the device of the first one, a CUDA device."""
    name, first = next((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    wanted = "cpu" if interpreted() else "cuda"
    if first.device.type != wanted:
        return f"{name} is on {first.device}; Triton kernels want a {wanted} device"
    return refusals.refused(tensors, floats, strided=strided, on=first.device)


def wanted_programs(device: torch.device) -> int:
    """Programs that keep a device busy: four per multiprocessor."""
    if device.type != "cuda":
        return 8  # interpreted: few, but more than one split
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class PackedTiles:
    """How a product of inputs [rows, in] with packed codes of [out, in] is cut up for programs.

    grid         programs: tiles of out, tiles of rows, splits of the blocks of each row
    blocks       whole blocks of a packed row (packing.py)
    tail_lanes   lanes of the narrower block after them
    per_split    blocks of one split
    constants    what programs of packed codes are compiled for
    """

    grid: tuple[int, int, int]
    blocks: int
    tail_lanes: int
    per_split: int
    constants: dict[str, int | bool]

    @property
    def splits(self) -> int:
        """Partial sums of each result. There are several where tiles alone are too few to fill the device."""
        return self.grid[2]


def packed_tiles(rows: int, out_features: int, in_features: int, bits: int, device: torch.device) -> PackedTiles:
    """The tiles of inputs [rows, in] and of out, and as many splits as fill the device with programs."""
    codes = codes_per_lane(bits)
    blocks, rest = divmod(in_features, LANES * codes)
    # A matrix product needs tiles of at least 16 rows; below that the programs multiply and add, two rows each.
    use_dot = rows >= 8
    block_b = (16 if rows <= 16 else 32) if use_dot else (1 if rows == 1 else 2)
    block_o = 64 if use_dot else 32
    tiles = -(-out_features // block_o), -(-rows // block_b)
    splits = max(1, min(_MAX_SPLITS, blocks, wanted_programs(device) // (tiles[0] * tiles[1])))
    per_split = max(1, -(-blocks // splits))
    return PackedTiles(
        grid=(*tiles, max(1, -(-blocks // per_split))),
        blocks=blocks,
        tail_lanes=-(-rest // codes),
        per_split=per_split,
        constants={
            "BITS": bits,
            "CODES": codes,
            "PLANES": words_per_lane(bits),
            "USE_DOT": use_dot,
            "BLOCK_B": block_b,
            "BLOCK_O": block_o,
        },
    )
