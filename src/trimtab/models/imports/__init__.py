"""Read checkpoints of other libraries into our grids: codes, scales and zero points carry over as they are.

GPTQ (both versions) and compressed-tensors `pack-quantized`. No dense weight is formed, and neither library is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import trimtab
from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.models.checkpoint import FORMAT_VERSION, StoredTensor, read_headers, weight_files
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.imports import compressed_tensors, gptq
from trimtab.models.imports.base import Reader, ReadLayer
from trimtab.models.quantizer import TrimtabQuantizationConfig
from trimtab.tensors.compressed import CompressedTensor

READERS: dict[str, type[Reader]] = {"gptq": gptq.GptqReader, "compressed-tensors": compressed_tensors.PackReader}
"""`quant_method` of config.json -> who reads it."""


def foreign_method(config: Mapping[str, Any]) -> str | None:
    """The method of READERS that a config.json names, None for any other."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if method in READERS else None


def load_foreign(directory: Path, method: str, options: Mapping[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a directory whose config.json names this method, and transformers' report of keys that do not fit.

    options   for `from_pretrained`, with output_loading_info=True

    Raises CheckpointError if tensors are missing, do not fit the model or use what our grids cannot say.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    quantization: dict[str, Any] = config.quantization_config
    del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    linears = {name: module for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    if not (files := weight_files(directory)):
        raise CheckpointError(f"{directory}: quantized weights are read from safetensors files, and it has none.")
    reader = READERS[method](quantization, str(directory))
    state, specs = _read(reader, linears, read_headers(files), str(directory))
    layers = TrimtabQuantizationConfig(specs, str(config.model_type), FORMAT_VERSION, trimtab.__version__)
    config.quantization_config = layers.to_dict()
    model, report = type(plain).from_pretrained(None, config=config, state_dict=state, **options)
    model.config.name_or_path = str(directory)
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model, report


def _read(
    reader: Reader, linears: Mapping[str, nn.Linear], stored: Mapping[str, StoredTensor], source: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dictionary in our terms, and the spec of each compressed layer."""
    files = {file: safe_open(file, "pt") for file in {place.file for place in stored.values()}}

    def tensor(name: str) -> Tensor:
        found: Tensor = files[stored[name].file].get_tensor(name)  # type: ignore[no-untyped-call]
        return found

    state: dict[str, Tensor] = {}
    specs: dict[str, Any] = {}
    taken: set[str] = set()
    for name in (name.removesuffix(f".{reader.codes}") for name in stored if name.endswith(f".{reader.codes}")):
        if name not in linears:
            raise CheckpointError(f"{source}: the weights have a quantized layer '{name}', which is no linear layer.")
        buffers = {leaf: tensor(f"{name}.{leaf}") for leaf in reader.buffers if f"{name}.{leaf}" in stored}
        taken |= {f"{name}.{leaf}" for leaf in buffers}
        shape = (linears[name].out_features, linears[name].in_features)
        try:
            grid = reader.grid(ReadLayer(name, shape, buffers))
        except (CheckpointError, ConfigError) as error:
            raise CheckpointError(f"{source}: layer '{name}': {error}") from None
        layer = CompressedLinear(CompressedTensor((grid,)))
        specs[name] = layer.spec
        state |= {f"{name}.{buffer}": value for buffer, value in layer.stored().items()}
        bias = f"{name}.bias"
        if bias in stored and linears[name].bias is None:
            if bool(tensor(bias).any()):
                raise CheckpointError(f"{source}: '{bias}' is not zero, but the model's '{name}' has no bias.")
            taken.add(bias)  # some writers store zeros where a layer has no bias
    if not specs:
        raise CheckpointError(f"{source}: config.json names a quantization, but no layer has '{reader.codes}'.")
    state |= {name: tensor(name) for name in stored if name not in taken}
    return state, specs
