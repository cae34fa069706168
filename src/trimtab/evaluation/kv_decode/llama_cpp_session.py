"""llama.cpp with its own weights file and cache types. Loads no torch."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.core.errors import CheckpointError
from trimtab.evaluation.kv_decode.measure import Setting

GGUF_FILE = "model.gguf"


class LlamaCppSession:
    """A model and a context through llama.cpp's C interface: what its own command line does, without sampling.

    Attention is llama.cpp's flash attention, which quantized values need and which is the faster one for f16.
    """

    def __init__(self, file: Path, setting: Setting, cache_type: str) -> None:
        self._api: Any = importlib.import_module("llama_cpp")
        self._setting = setting
        self._quiet = self._api.llama_log_callback(lambda *_: None)  # kept: the library calls it while it lives
        self._api.llama_log_set(self._quiet, None)
        self._api.llama_backend_init()
        self._model = self._api.llama_model_load_from_file(str(file).encode(), self._api.llama_model_default_params())
        if not self._model:
            raise CheckpointError(f"llama.cpp cannot load {file}.")
        threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        params = self._api.llama_context_default_params()
        params.n_ctx = -(-setting.positions // 256) * 256
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = getattr(self._api, f"GGML_TYPE_{cache_type.upper()}")
        params.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            raise CheckpointError(
                f"llama.cpp cannot make a context of {params.n_ctx} tokens with a {cache_type} cache."
            )
        self._batch = int(params.n_batch)

    def prefill(self, tokens: Sequence[int]) -> None:
        """Empty the cache and read the prompt, in pieces of llama.cpp's default batch size."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        for start in range(0, len(tokens), self._batch):
            self._decode(tokens[start : start + self._batch])

    def step(self, token: int) -> None:
        """One token."""
        self._decode([token])

    def _decode(self, tokens: Sequence[int]) -> None:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        status = self._api.llama_decode(self._context, self._api.llama_batch_get_one(ids, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens gave {status}")
        self._api.llama_synchronize(self._context)

    def logits(self) -> list[float]:
        """Of the last token."""
        return list(self._api.llama_get_logits_ith(self._context, -1)[: self._setting.vocabulary])

    def weight_bytes(self) -> int:
        """Of all tensors in the file."""
        return int(self._api.llama_model_size(self._model))

    def kv_bytes(self) -> int:
        """What llama.cpp writes to keep the sequence: keys and values of the tokens, and a few bytes more."""
        return int(self._api.llama_state_seq_get_size(self._context, 0))

    def reference_step(self, token: int) -> None:
        """There is none."""

    def facts(self) -> dict[str, Any]:
        """Version, instruction sets, and how the bytes were counted."""
        features = self._api.llama_print_system_info().decode()
        return {
            "library": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
            "features": " ".join(part.partition("=")[0].strip() for part in features.split("|") if "= 1" in part),
            "kv_bytes_from": "llama_state_seq_get_size",
        }


def open_llama_cpp(directory: Path, setting: Setting, *, cache_type: str) -> LlamaCppSession:
    """llama.cpp with keys and values of this type, on the file that was written beside the model."""
    return LlamaCppSession(directory / GGUF_FILE, setting, cache_type)
