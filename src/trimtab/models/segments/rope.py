"""Rotary embedding as the model computes it: its cosines and sines, and its exact inverse."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.core.errors import TargetError
from trimtab.kernels.kv_attention import Rope
from trimtab.models.narrow import NarrowAttention
from trimtab.tensors.kv.rotary import inverse_rope

_GROWTH = 1024
_FEW, _KEPT = 64, 4
"""Angles of at most so many positions are kept for the next layer, and so many of them."""
_MOVING = ("dynamic", "longrope")  # kinds whose angles depend on the length of the text


class RopeSource:
    """The angles of one kind of layer, read from the model's own rotary module, in the precision that the model uses.

    kind   of the layer, as the configuration names it; None if all layers are the same

    Raises TargetError for a model without rotary positions, for kinds of rotary embedding whose angles change with the
    length of the text, and for heads that lost some of their rotary pairs: a stored key could not be rotated as the
    model would.
    """

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        config = model.config.get_text_config()
        module = next((m for name, m in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"), None)
        if module is None:
            raise TargetError(
                f"{type(model).__name__} has no rotary positions, which this cache needs: it stores keys before they "
                "are rotated. Use a cache that stores them after it, such as kivi or gear."
            )
        parameters = getattr(config, "rope_parameters", None) or {}
        kinds = list(getattr(config, "layer_types", None) or [])
        self.kind = kinds[layer] if kinds and "layer_type" in inspect.signature(module.forward).parameters else None
        own = parameters.get(self.kind, parameters) if self.kind else parameters
        if own.get("rope_type") in _MOVING:
            raise TargetError(
                f"{type(model).__name__} has rotary embedding of type '{own['rope_type']}', whose angles change with "
                "the length of the text, so keys cannot be stored before it. Use kivi or gear."
            )
        for name, part in model.named_modules():
            if isinstance(part, NarrowAttention) and part.pairs is not None:
                raise TargetError(
                    f"{name}: each head has rotary pairs of its own, since some were removed, and this cache rotates "
                    "all heads alike. Use a cache that stores keys as they come, such as kivi or gear."
                )
        self._module: nn.Module = module
        self._dtype = model.dtype
        self._table: Rope | None = None
        self._recent: dict[tuple[object, ...], Rope] = {}

    def angles(self, positions: Tensor) -> Rope:
        """Cosines and sines [*positions.shape, half] at these positions."""
        flat = positions.reshape(1, -1)
        key = (positions.device, tuple(positions.shape), tuple(flat[0].tolist())) if flat.numel() <= _FEW else None
        if key is None:
            return self._computed(positions, flat)
        if key not in self._recent:  # layers ask for the same positions one after the other
            if len(self._recent) >= _KEPT:
                self._recent.clear()
            self._recent[key] = self._computed(positions, flat)
        return self._recent[key]

    def _computed(self, positions: Tensor, flat: Tensor) -> Rope:
        like = torch.empty(0, dtype=self._dtype, device=positions.device)
        extra = () if self.kind is None else (self.kind,)
        cos, sin = self._module(like, flat, *extra)
        half = cos.shape[-1] // 2
        return Rope(
            cos[0, :, :half].float().reshape(*positions.shape, half).contiguous(),
            sin[0, :, :half].float().reshape(*positions.shape, half).contiguous(),
        )

    def table(self, length: int, device: torch.device) -> Rope:
        """The angles of positions 0 to at least length - 1; grows by steps and is kept."""
        if self._table is None or self._table.positions < length or self._table.cos.device != device:
            size = -(-length // _GROWTH) * _GROWTH
            self._table = self.angles(torch.arange(size, device=device))
        return self._table


def rotated(x: Tensor, rope: Rope) -> Tensor:
    """x [..., m, d] rotated by angles [..., m, half], in float32 or wider, returned in the dtype of x."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = rope.cos.shape[-1]
    cos, sin, y = rope.cos.to(work), rope.sin.to(work), x.to(work)
    first, second, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def unrotated(x: Tensor, rope: Rope) -> Tensor:
    """The inverse of `rotated`, exact to rounding; the scaling that cos and sin hold is divided out."""
    return rotated(x, inverse_rope(rope))
