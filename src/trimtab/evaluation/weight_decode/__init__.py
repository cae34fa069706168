"""Decoding with compressed weights: trimtab's representations and other libraries' in one run on the same weights.

    systems             which systems there are, by name, and what each needs installed
    _run                makes the model and its expected logits once, and lets `beside` give each system a process
    measure             what is measured, the same for all
    trimtab_session     this library's representations, with low-rank and outlier terms and a cache where wanted, and
                        its pruned models beside the dense one
    peer_sessions       torch and what quantizes its linear layers in place: quantizing.py
    llama_cpp           llama.cpp with the formats that its own quantization makes of the same weights

Names are imported on first use: the process that measures llama.cpp holds no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports

if TYPE_CHECKING:
    from trimtab.evaluation.weight_decode._run import run as run
    from trimtab.evaluation.weight_decode.measure import Setting as Setting
    from trimtab.evaluation.weight_decode.systems import choose as choose

__getattr__, __dir__ = lazy_exports(__name__, {"Setting": "measure", "choose": "systems", "run": "_run"})
