"""Readers of the exported formats, written from their descriptions alone: slow, one number at a time, no code of ours.

Each gives the weights [out, in] that a reader of the format computes.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

Array = NDArray[Any]


def stream(words: Array, bits: int, count: int) -> list[int]:
    """The first numbers of a stream of bits in little-endian 32-bit words."""
    number = int.from_bytes(np.ascontiguousarray(words).astype("<i4").tobytes(), "little")
    return [number >> bits * i & (1 << bits) - 1 for i in range(count)]


def packed_layers(directory: Path) -> dict[str, Array]:
    """Layer -> weight of a compressed-tensors directory; settings by the names in `targets`."""
    import re

    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    found = {}
    for name in (key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")):
        groups = [
            group["weights"]
            for group in config["config_groups"].values()
            if any(t == "Linear" or (t[:3] == "re:" and re.match(t[3:], name)) for t in group["targets"])
        ]
        assert len(groups) == 1, (name, groups)
        found[name] = _packed(tensors, name, groups[0])
    return found


def _packed(tensors: dict[str, torch.Tensor], name: str, weights: dict[str, Any]) -> Array:
    bits = weights["num_bits"]
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    packed, scale = tensors[f"{name}.weight_packed"].numpy(), tensors[f"{name}.weight_scale"].double().numpy()
    q = np.array([stream(row, bits, columns) for row in packed]) - 2 ** (bits - 1)
    group = columns if weights["strategy"] == "channel" else weights["group_size"]
    zero = np.zeros(scale.shape)
    if not weights["symmetric"]:
        stored = tensors[f"{name}.weight_zero_point"].numpy()
        zero = np.array([stream(column, bits, rows) for column in stored.T]).T - 2 ** (bits - 1)
    return (q - np.repeat(zero, group, axis=1)) * np.repeat(scale, group, axis=1)


def gptq_layers(directory: Path) -> dict[str, Array]:
    """Layer -> weight of a GPTQ directory, by g_idx."""
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config == json.loads((directory / "quantize_config.json").read_text())
    bits, found = config["bits"], {}
    for name in (key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")):
        qweight, qzeros = (tensors[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros"))
        scales, order = tensors[f"{name}.scales"].double().numpy(), tensors[f"{name}.g_idx"].numpy()
        codes = np.array([stream(column, bits, len(order)) for column in qweight.T])
        zeros = np.array([stream(row, bits, scales.shape[1]) for row in qzeros])
        if config["checkpoint_format"] == "gptq":
            zeros = zeros + 1
        found[name] = np.array(
            [[scales[g, o] * (codes[o, j] - zeros[g, o]) for j, g in enumerate(order)] for o in range(len(codes))]
        )
    return found


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, tuple[int, tuple[int, ...], bytes]]]:
    """(metadata, tensor -> (ggml type, shape [out, in], its bytes)) of a GGUF file of version 3."""
    data, at = file.read_bytes(), 0

    def take(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values[0]

    def text() -> str:
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at].decode()

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return take({0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}[kind])

    assert data[:4] == b"GGUF"
    at = 4
    version, tensor_count, pair_count = take("I"), take("Q"), take("Q")
    assert version == 3
    metadata = {text(): value(take("I")) for _ in range(pair_count)}
    places = {}
    for _ in range(tensor_count):
        name, axes = text(), take("I")
        shape = tuple(reversed([take("Q") for _ in range(axes)]))
        places[name] = (take("I"), shape, take("Q"))
    start = -(-at // 32) * 32
    tensors = {}
    for name, (kind, shape, offset) in places.items():
        size, nbytes = BLOCK_BYTES[kind]
        assert offset % 32 == 0
        begin, length = start + offset, int(np.prod(shape)) // size * nbytes
        tensors[name] = (kind, shape, data[begin : begin + length])
        assert len(tensors[name][2]) == length
    return metadata, tensors


BLOCK_BYTES = {0: (1, 4), 1: (1, 2), 30: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34), 10: (256, 84), 11: (256, 110),
               12: (256, 144), 14: (256, 210)}  # fmt: skip
"""ggml type -> (weights, bytes) of a block."""
TYPE_OF = {"q4_0": 2, "q4_1": 3, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q6_k": 14}


def gguf_weight(kind: int, shape: tuple[int, ...], data: bytes) -> Array:
    """The numbers of one tensor, float64."""
    if kind in (0, 1):
        return np.frombuffer(data, "<f4" if kind == 0 else "<f2").astype(float).reshape(shape)
    if kind == 30:
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(float).reshape(shape)
    size, nbytes = BLOCK_BYTES[kind]
    blocks = [data[i : i + nbytes] for i in range(0, len(data), nbytes)]
    return np.array([[_weight(kind, block, i) for i in range(size)] for block in blocks]).reshape(shape)


def _half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block[at : at + 2], "<f2")[0])


def _weight(kind: int, block: bytes, i: int) -> float:
    """Weight number i of a block."""
    if kind == 8:
        return _half(block, 0) * struct.unpack_from("b", block, 2 + i)[0]
    if kind in (2, 3):
        code = block[(2 if kind == 2 else 4) + i % 16] >> 4 * (i // 16) & 15
        return _half(block, 0) * (code - 8) if kind == 2 else _half(block, 0) * code + _half(block, 2)
    if kind == 12:
        s, k = block[4:16], i // 32
        scale = s[k] & 63 if k < 4 else (s[k + 4] & 15) | s[k - 4] >> 6 << 4
        low = s[k + 4] & 63 if k < 4 else s[k + 4] >> 4 | s[k] >> 6 << 4
        code = block[16 + i // 64 * 32 + i % 32] >> 4 * (i % 64 // 32) & 15
        return _half(block, 0) * scale * code - _half(block, 2) * low
    if kind == 10:
        code = block[16 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
        return _half(block, 80) * (block[i // 16] & 15) * code - _half(block, 82) * (block[i // 16] >> 4)
    if kind == 11:
        low = block[32 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
        code = low - (0 if block[i % 32] >> i // 32 & 1 else 4)
        k = i // 16
        scale = (block[96 + k % 8] >> 4 * (k // 8) & 15) | (block[104 + k % 4] >> 2 * (k // 4) & 3) << 4
        return _half(block, 108) * (scale - 32) * code
    assert kind == 14
    half, at = divmod(i, 128)
    low = block[half * 64 + at % 64] >> 4 * (at // 64) & 15
    high = block[128 + half * 32 + at % 32] >> 2 * (at // 32) & 3
    scale = struct.unpack_from("b", block, 192 + i // 16)[0]
    return _half(block, 208) * scale * ((low | high << 4) - 32)
