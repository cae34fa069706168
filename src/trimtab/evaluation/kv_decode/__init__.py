"""Decoding with a long context: trimtab's caches, transformers' and other libraries' in one run on the same weights.

    systems     which systems there are, by name, and what each needs installed
    _run        makes the model once, and lets `beside` give each system a process of its own
    measure     what is measured, the same for all: `Session` is what a system has to offer
    torch_sessions, llama_cpp_session     the systems

Names are imported on first use: the process that measures llama.cpp holds no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports

if TYPE_CHECKING:
    from trimtab.evaluation.kv_decode._run import run as run
    from trimtab.evaluation.kv_decode.measure import Setting as Setting
    from trimtab.evaluation.kv_decode.systems import choose as choose

__getattr__, __dir__ = lazy_exports(__name__, {"Setting": "measure", "choose": "systems", "run": "_run"})
