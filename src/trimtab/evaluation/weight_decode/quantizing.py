"""How other libraries quantize the linear layers of a module in place, each as its own documentation says."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

HEAD = "lm_head"
"""Left in 16 bits by all of them, as transformers' integrations leave it."""


def linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, attribute, linear) of every linear layer but the head; `setattr(parent, attribute, other)` replaces."""
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Linear) and name.rpartition(".")[2] != HEAD:
            parent, _, attribute = name.rpartition(".")
            yield module.get_submodule(parent), attribute, child


def quanto_int4(module: nn.Module) -> None:
    """optimum-quanto's qint4, in its default groups of 128."""
    quanto: Any = importlib.import_module("optimum.quanto")
    quanto.quantize(module, weights=quanto.qint4, exclude=f"*{HEAD}")
    quanto.freeze(module)


def bitsandbytes_nf4(module: nn.Module) -> None:
    """bitsandbytes' NF4 in blocks of 64, with double quantization and products in bfloat16."""
    bnb: Any = importlib.import_module("bitsandbytes")
    for parent, attribute, linear in linears(module):
        made = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        made.bias = linear.bias
        setattr(parent, attribute, made.to("cpu"))  # which quantizes


def torchao_int4(module: nn.Module) -> None:
    """torchao's int4 weights in groups of 128, in the layout of its processor kernels: the others want a GPU."""
    torchao: Any = importlib.import_module("torchao.quantization")
    workflow: Any = importlib.import_module("torchao.prototype.quantization.int4.inference_workflow")
    torchao.quantize_(module, workflow.PrototypeInt4WeightOnlyConfig(group_size=128), filter_fn=_not_the_head)


def torchao_int8(module: nn.Module) -> None:
    """torchao's int8 weights, one scale per row."""
    torchao: Any = importlib.import_module("torchao.quantization")
    torchao.quantize_(module, torchao.Int8WeightOnlyConfig(), filter_fn=_not_the_head)


def hqq_4(module: nn.Module) -> None:
    """hqq's 4 bits in groups of 64 along the inputs, through its PyTorch product: the faster ones want a GPU."""
    hqq: Any = importlib.import_module("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    for parent, attribute, linear in linears(module):
        setattr(parent, attribute, hqq.HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu"))


def llmcompressor_gptq(model: nn.Module, tokens: Tensor, *, bits: int, group_size: int, symmetric: bool) -> None:
    """llmcompressor's GPTQ with its defaults (sequential, static order by activation), as its `oneshot` does.

    tokens   int64 [sequences, length], the calibration text

    It leaves rounded dense weights in the model.
    """
    gptq: Any = importlib.import_module("llmcompressor.modifiers.gptq")
    quantization: Any = importlib.import_module("compressed_tensors.quantization")
    weights = quantization.QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group_size
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    llmcompressor_oneshot(model, tokens, gptq.GPTQModifier(config_groups={"group_0": scheme}, ignore=[HEAD]))


def llmcompressor_oneshot(model: nn.Module, tokens: Tensor, modifier: Any) -> None:
    """llmcompressor's `oneshot` with one modifier, on tokens int64 [sequences, length]."""
    llmcompressor: Any = importlib.import_module("llmcompressor")
    datasets: Any = importlib.import_module("datasets")
    rows = tokens.tolist()
    llmcompressor.oneshot(
        model=model,
        dataset=datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=modifier,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )


def nothing(module: nn.Module) -> None:
    """Weights stay as they are."""


QUANTIZERS: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "torch/bf16": ("torch", nothing),
    "quanto/int4": ("optimum-quanto", quanto_int4),
    "bitsandbytes/nf4": ("bitsandbytes", bitsandbytes_nf4),
    "torchao/int4": ("torchao", torchao_int4),
    "torchao/int8": ("torchao", torchao_int8),
    "hqq/4": ("hqq", hqq_4),
}
"""System -> (package whose version counts, what quantizes)."""


def weight_tensors(module: nn.Module) -> list[Tensor]:
    """All tensors that stand for weights: parameters, buffers, and what bitsandbytes and hqq keep beside them."""
    found: list[Tensor] = [*module.parameters(), *module.buffers()]
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # bitsandbytes quantizes its scales too, and keeps their state in the state
            found += [value for value in vars(state).values() if isinstance(value, Tensor)]
            state = getattr(state, "state2", None)
    for child in module.modules():
        if isinstance(meta := getattr(child, "meta", None), dict):
            found += [value for value in meta.values() if isinstance(value, Tensor)]
    return found


def _not_the_head(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.rpartition(".")[2] != HEAD
