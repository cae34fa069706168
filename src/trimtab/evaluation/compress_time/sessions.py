"""How each system compresses the model: to 4 bits in groups of 64, or to half of the weights."""

from __future__ import annotations

import importlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import trimtab
from trimtab import models
from trimtab.evaluation.compress_time.measure import Setting
from trimtab.evaluation.pruning_peers import llmcompressor_pruning
from trimtab.evaluation.weight_decode.quantizing import HEAD, linears, llmcompressor_gptq
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.compression import compress
from trimtab.weights.gptq import Gptq
from trimtab.weights.loftq import Loftq
from trimtab.weights.sparsegpt import Sparsegpt
from trimtab.weights.wanda import Wanda

TOKENS_FILE = "tokens.safetensors"


def write_tokens(directory: Path, tokens: Tensor) -> None:
    """Keep the calibration tokens, int64 [sequences, length], beside the model."""
    save_file({"tokens": tokens.contiguous()}, directory / TOKENS_FILE)


class TorchSession(ABC):
    """A transformers model and the calibration tokens."""

    library = "trimtab"
    largest_error = 0.05  # rounding to 4 bits in groups of 64 leaves about 0.01

    def __init__(self, directory: Path, setting: Setting) -> None:
        self.directory, self.setting = directory, setting
        self.model: Any = models.load(directory)
        self.tokens = load_file(directory / TOKENS_FILE)["tokens"]

    @abstractmethod
    def compress(self) -> None:
        """What is timed."""

    def compressed(self) -> Iterator[tuple[str, Tensor]]:
        """Name of each compressed layer, and the dense float32 weight that it stands for."""
        for name, module in self.model.named_modules():
            if isinstance(module, CompressedLinear):
                yield name, module.dequantize()

    def weight_error(self) -> float:
        """sum |W~ - W|^2 / sum |W|^2; the model is read again for W. NaN if a layer is missing."""
        original = models.load(self.directory)
        missing = sum(1 for _ in linears(original))
        error, total = 0.0, 0.0
        for name, found in self.compressed():
            missing -= 1
            weight = original.get_submodule(name).weight.detach().float()  # type: ignore[operator]
            error += float((found.float() - weight).square().sum())
            total += float(weight.square().sum())
        return float("nan") if missing else error / total

    def facts(self) -> dict[str, Any]:
        """The library's version."""
        own = self.library == "trimtab"
        version = trimtab.__version__ if own else importlib.metadata.version(self.library)
        return {"library": f"{self.library} {version}"}


class TrimtabGptq(TorchSession):
    """gptq, block after block with inputs of the compressed blocks before; symmetric, as the other one."""

    def compress(self) -> None:
        """As tt.compress does."""
        method = Gptq(bits=4, group_size=self.setting.group_size, symmetric=True)
        compress(self.model, method, calibration=CalibrationSet.from_tokens(self.tokens), progress=False)


class LlmcompressorGptq(TorchSession):
    """llmcompressor's GPTQ with its defaults; it leaves rounded dense weights in the model."""

    library = "llmcompressor"

    def compress(self) -> None:
        """As its `oneshot` does."""
        llmcompressor_gptq(self.model, self.tokens, bits=4, group_size=self.setting.group_size, symmetric=True)

    def compressed(self) -> Iterator[tuple[str, Tensor]]:
        """Linears with a scale."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and hasattr(module, "weight_scale"):
                yield name, module.weight.detach()


class TrimtabLoftq(TorchSession):
    """loftq with NF4, as peft's."""

    def compress(self) -> None:
        """As tt.compress does."""
        setting = self.setting
        method = Loftq(bits=4, group_size=setting.group_size, rank=setting.rank, iterations=setting.iterations)
        compress(self.model, method, progress=False)


class PeftLoftq(TorchSession):
    """peft's LoftQ: NF4 in blocks of 64 and a LoRA adapter. It names a GPU where it computes; here it gets the CPU."""

    library = "peft"

    def compress(self) -> None:
        """As `get_peft_model` with `init_lora_weights="loftq"` does; it leaves rounded dense weights in the model."""
        peft: Any = importlib.import_module("peft")
        setting = self.setting
        names = sorted({attribute for _, attribute, _ in linears(self.model)})
        config = peft.LoraConfig(
            r=setting.rank,
            lora_alpha=setting.rank,
            target_modules=names,
            init_lora_weights="loftq",
            loftq_config=peft.LoftQConfig(loftq_bits=4, loftq_iter=setting.iterations),
        )
        with _OnTheCpu():
            self.model = peft.get_peft_model(self.model, config)

    def compressed(self) -> Iterator[tuple[str, Tensor]]:
        """Base weight and adapter together."""
        for name, module in self.model.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                factors = [getattr(module, part)["default"].weight.detach().float() for part in ("lora_B", "lora_A")]
                scaling = float(module.scaling["default"])
                yield name, module.base_layer.weight.detach().float() + scaling * (factors[0] @ factors[1])


class TrimtabPruning(TorchSession):
    """sparsegpt or wanda at 50 %."""

    largest_error = 0.4  # the smaller half of normal weights holds 0.07 of their square; corrections move the rest

    def __init__(self, directory: Path, setting: Setting, method: Literal["sparsegpt", "wanda"]) -> None:
        super().__init__(directory, setting)
        self.method = {"sparsegpt": Sparsegpt, "wanda": Wanda}[method](sparsity=0.5)

    def compress(self) -> None:
        """As tt.compress does."""
        compress(self.model, self.method, calibration=CalibrationSet.from_tokens(self.tokens), progress=False)


class LlmcompressorPruning(TorchSession):
    """One of llmcompressor's modifiers at 50 %, which leaves zeros in dense weights."""

    library = "llmcompressor"
    largest_error = TrimtabPruning.largest_error

    def __init__(self, directory: Path, setting: Setting, modifier: str) -> None:
        super().__init__(directory, setting)
        self.modifier = modifier
        importlib.import_module("llmcompressor.modifiers.pruning")  # before the clock starts

    def compress(self) -> None:
        """As its `oneshot` does."""
        llmcompressor_pruning(self.model, self.tokens, modifier=self.modifier, sparsity="0.5")

    def compressed(self) -> Iterator[tuple[str, Tensor]]:
        """All linears but the head."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and name != HEAD:
                yield name, module.weight.detach()


class _OnTheCpu(TorchFunctionMode):
    """Moves that name a CUDA device go to the CPU."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def on_cpu(value: Any) -> Any:
            named = value == "cuda" or (isinstance(value, torch.device) and value.type == "cuda")
            return torch.device("cpu") if named else value

        plain = {name: value if isinstance(value, Tensor) else on_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*(arg if isinstance(arg, Tensor) else on_cpu(arg) for arg in args), **plain)
