"""llama.cpp with each of its weight formats, made by its own quantization from one 16-bit file. Loads no torch."""

from __future__ import annotations

import ctypes
import importlib
import os
from pathlib import Path
from typing import Any

from trimtab.core.errors import CheckpointError
from trimtab.evaluation.kv_decode.llama_cpp_session import GGUF_FILE, LlamaCppSession
from trimtab.evaluation.weight_decode.measure import Setting

BASE_TYPE = "f16"
"""Of the file that the run writes; the others are made from it."""


class WeightSession(LlamaCppSession):
    """A llama.cpp session that knows how many bytes of weights a step reads."""

    def __init__(self, file: Path, setting: Setting, cache_type: str) -> None:
        super().__init__(file, setting, cache_type)
        gguf: Any = importlib.import_module("gguf")
        tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors}
        self._embedding_bytes = tensors["token_embd.weight"] if "output.weight" in tensors else 0

    def embedding_bytes(self) -> int:
        """Of the embedding; 0 if it is the output matrix too."""
        return self._embedding_bytes


def open_llama_cpp(directory: Path, setting: Setting, *, weight_type: str, cache_type: str) -> WeightSession:
    """llama.cpp with weights and cache of these types; its quantization chooses the mixture within `weight_type`."""
    base = directory / GGUF_FILE
    if weight_type == BASE_TYPE:
        return WeightSession(base, setting, cache_type)
    file = directory / f"{weight_type}.gguf"
    if not file.exists():
        quantize_gguf(base, file, weight_type)
    return WeightSession(file, setting, cache_type)


def quantize_gguf(source: Path, target: Path, weight_type: str) -> None:
    """Write `source` in another of llama.cpp's formats ("q4_0", "q4_k_m", ...). Raises CheckpointError."""
    api: Any = importlib.import_module("llama_cpp")
    quiet = api.llama_log_callback(lambda *_: None)  # kept: the library calls it while it works
    api.llama_log_set(quiet, None)
    params = api.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPES[weight_type]
    params.nthread = len(os.sched_getaffinity(0))
    status = api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status:
        raise CheckpointError(f"llama.cpp cannot make {weight_type} of {source} (status {status}).")


_FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q2_k": 10, "q3_k_m": 12, "q4_k_m": 15}
"""llama_ftype of llama.h, which the Python package names only in comments."""
