"""How much each block changes what passes through it: 1 - E[cos(in, out)] over tokens (ShortGPT, arXiv:2403.03853)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import NumericsError
from trimtab.models.calibration import CHUNK_TOKENS, CalibrationSet, run_blocks
from trimtab.models.captured_call import first_output
from trimtab.models.views import ModelView


def block_influence(
    view: ModelView, calibration: CalibrationSet, *, chunk_tokens: int = CHUNK_TOKENS
) -> dict[str, float]:
    """Name of each block -> 1 - E[cos(its input, its output)] over tokens that are not padding, in [0, 2].

    One forward pass without the output head, some sequences at a time: memory is that of one chunk's activations. The
    cosine is computed in float32 and summed in float64; a token that is zero before or after a block counts as
    unchanged direction 0. Raises NumericsError naming the first block that puts out NaN or infinity.
    """
    sums: dict[str, Tensor] = {}
    at_once = max(1, chunk_tokens // calibration.length)
    mask = calibration.mask

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            before, after = arguments[0][mask].float(), first_output(output)[mask].float()
            cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).sum(dtype=torch.float64)
            if not bool(torch.isfinite(cosine)):
                raise NumericsError(
                    f"block {name} puts out NaN or infinite values on the calibration text. Check its weights, or load "
                    "the model in a wider dtype (float32)."
                )
            sums[name] = sums.get(name, 0.0) + cosine.cpu()

        return hook

    with ExitStack() as hooks:
        for block in view.blocks:
            hooks.callback(block.module.register_forward_hook(watch(block.name)).remove)
        for start in range(0, len(calibration.tokens), at_once):
            rows = slice(start, start + at_once)
            mask = calibration.mask[rows]
            run_blocks(view.model, calibration, rows)
    return {name: 1 - float(total) / calibration.count for name, total in sums.items()}
