"""PEFT LoRA adapters: the low-rank parts of a model beside a base that holds everything else.

    PATH/base/      a Hugging Face directory of Q, the sum of all other parts
    PATH/adapter/   adapter_config.json, adapter_model.safetensors

PEFT computes `Q x + s B A x` with s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA. With L1 L2 the low-rank
part, `lora_B = L1 / sqrt(s)` and `lora_A = L2 / sqrt(s)`, so any alpha starts from exactly Q + L1 L2. (LoftQ's own
code and PEFT's initialisation store undivided factors, which is right for s = 1 only.) Factors are float32, as PEFT
trains them. Several low-rank parts become one of the sum of their ranks; a transform T of the input is folded into Q T
and L2 T.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab.core.errors import ConfigError, TargetError
from trimtab.models.exports.base import ExportFormat, Layer, Source, rounded_input
from trimtab.models.exports.compressed_tensors import CompressedTensors
from trimtab.models.exports.hf_directory import disk_errors, model_tensors, write_model
from trimtab.models.info import info_of
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.low_rank import LowRank

__all__ = ["Peft"]

BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True, kw_only=True)
class Peft(ExportFormat):
    """A LoRA adapter, and the base it belongs to.

    alpha        lora_alpha of all layers; without it each layer's own rank, so that the factors stay as they are
    use_rslora   the adapter is scaled by alpha / sqrt(r)
    base         dense: Q in the model's dtype; compressed-tensors: Q as that format, codes as they are; none: no base
    """

    name: ClassVar[str] = "peft"
    marker: ClassVar[str | None] = f"{ADAPTER}/adapter_config.json"

    alpha: float | None = None
    use_rslora: bool = False
    base: Literal["dense", "compressed-tensors", "none"] = "dense"

    def check(self) -> None:
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"Peft: option alpha={self.alpha} must be a positive number.")

    def refusal(self, layer: Layer) -> str | None:
        if reason := rounded_input(layer):
            return reason
        if self.base == "compressed-tensors":
            rest = _rest(layer)
            reason = "it has no part but low rank" if rest is None else CompressedTensors().refusal(rest)
            return None if reason is None else f"{reason} (base=compressed-tensors)"
        return None

    @classmethod
    def offer(cls, layer: Layer, source: Source) -> str | None:
        """Any layer fits the dense base; this is offered where there is something to put into an adapter."""
        return cls.name if _factors(layer) and cls().refusal(layer) is None else None

    def check_source(self, source: Source) -> None:
        """Raise TargetError if there is no low-rank part to write."""
        if not any(_factors(layer) for layer in source.layers.values()):
            raise TargetError(
                "peft: no layer has a low-rank part, so there is nothing to write as an adapter. Use another format, "
                "or a method that makes low-rank parts."
            )

    def write(self, source: Source, path: Path, final: Path) -> list[dict[str, Any]]:
        factors = {name: found for name, layer in source.layers.items() if (found := _factors(layer))}
        base_name = info_of(source.model).source if self.base == "none" else str(final / BASE)
        entries = self._write_base(source, path, factors)
        (path / ADAPTER).mkdir()
        config = self._adapter_config(source, factors, base_name)
        text = json.dumps(config, indent=2) + "\n"
        (path / ADAPTER / "adapter_config.json").write_text(text, encoding="utf-8")
        tensors = {}
        for name, (left, right) in factors.items():
            share = math.sqrt(self._scaling(left.shape[1]))
            tensors[f"base_model.model.{name}.lora_A.weight"] = (right / share).contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = (left / share).contiguous()
        with disk_errors():
            save_file(tensors, path / ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
        return entries

    def _write_base(
        self, source: Source, path: Path, factors: Mapping[str, tuple[Tensor, Tensor]]
    ) -> list[dict[str, Any]]:
        if self.base == "none":
            return [_entry(name, "adapter", 0.0) for name in factors]
        (path / BASE).mkdir()
        if self.base == "compressed-tensors":
            rests = {name: rest for name, layer in source.layers.items() if (rest := _rest(layer))}
            written = CompressedTensors().write(Source(source.model, rests, source.dense), path / BASE, path / BASE)
            return [_entry(e["layer"], _stored_as(e["layer"], e["stored_as"], factors), 0.0) for e in written]
        entries: list[dict[str, Any]] = []

        def dense(layer: Layer) -> dict[str, Tensor]:
            rest = _rest(layer)
            exact = torch.zeros(layer.tensor.shape) if rest is None else rest.tensor.dequantize()
            weight = exact.to(source.model.dtype)
            norm = float(layer.tensor.dequantize().norm())
            error = float((weight.float() - exact).norm()) / norm if norm else 0.0
            kind = str(source.model.dtype).removeprefix("torch.")
            entries.append(_entry(layer.name, _stored_as(layer.name, kind, factors), error))
            return {"weight": weight.t().contiguous() if layer.transposed else weight}

        write_model(source, path / BASE, model_tensors(source, dense), None)
        return entries

    def _scaling(self, rank: int) -> float:
        alpha = self._natural_alpha(rank) if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _natural_alpha(self, rank: int) -> float:
        """The alpha whose scaling is 1."""
        return math.sqrt(rank) if self.use_rslora else rank

    def _adapter_config(
        self, source: Source, factors: Mapping[str, tuple[Tensor, Tensor]], base_name: str
    ) -> dict[str, Any]:
        ranks = {name: int(left.shape[1]) for name, (left, _) in factors.items()}
        rank = max(ranks.values(), key=list(ranks.values()).count)
        others = {re.escape(name): own for name, own in ranks.items() if own != rank}
        own_alpha = {name: self._natural_alpha(own) for name, own in others.items()}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": self._natural_alpha(rank) if self.alpha is None else self.alpha,
            "rank_pattern": others,
            "alpha_pattern": own_alpha if self.alpha is None else {},
            "use_rslora": self.use_rslora,
            "target_modules": sorted(ranks),
            "fan_in_fan_out": any(source.layers[name].transposed for name in ranks),
            "lora_dropout": 0.0,
            "bias": "none",
            "init_lora_weights": True,
            "modules_to_save": None,
        }


def _factors(layer: Layer) -> tuple[Tensor, Tensor] | None:
    """(left [out, r], right [r, in]) of all low-rank parts together, float32, acting on the layer's own input."""
    parts = [part for part in layer.tensor.parts if isinstance(part, LowRank) and part.rank]
    if not parts:
        return None
    left = torch.cat([part.left.float() for part in parts], dim=1)
    right = torch.cat([part.right.float() for part in parts])
    transform = layer.tensor.transform
    return left, right if transform is None else transform.fold(right)


def _rest(layer: Layer) -> Layer | None:
    """The layer without its low-rank parts; None if it has no other."""
    parts = tuple(part for part in layer.tensor.parts if not isinstance(part, LowRank))
    return Layer(layer.name, CompressedTensor(parts, layer.tensor.transform), layer.transposed) if parts else None


def _stored_as(name: str, base: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    return f"{base} + adapter" if name in factors else base


def _entry(name: str, stored_as: str, error: float) -> dict[str, Any]:
    return {"layer": name, "stored_as": stored_as, "relative_error": error}
