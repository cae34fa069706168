"""trimtab checkpoints for `from_pretrained`, through transformers' public quantizer registration.

Imported by registration.py while transformers is being imported: nothing here may need its models.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trimtab.core.errors import CheckpointError
from trimtab.models.checkpoint import (
    FORMAT_VERSION,
    MANIFEST,
    StoredTensor,
    check_tensors,
    check_version,
    read_headers,
    read_manifest,
)
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.info import attach, info_from_manifest, info_of

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

METHOD = "trimtab"


class TrimtabQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a trimtab checkpoint.

    layers      name of a linear layer -> spec of the compressed tensor that stands there
    narrow      name of a linear layer -> shape and bias, where they are not as the rest of the configuration says
    model_type  of the model that was saved; the same specs do not fit another
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        model_type: str = "",
        format_version: int = FORMAT_VERSION,
        trimtab_version: str = "",
        quant_method: str = METHOD,
        narrow: Mapping[str, Mapping[str, Any]] | None = None,
        **newer: Any,
    ) -> None:
        # options of newer formats are kept unread until the quantizer has looked at the version
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.trimtab_version = trimtab_version
        self.model_type = model_type
        self.layers = layers
        self.narrow = dict(narrow or {})
        self.newer = newer

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        if not self.narrow:
            del data["narrow"]
        return {**data.pop("newer"), **data}

    def __repr__(self) -> str:
        return f"TrimtabQuantizationConfig({len(self.layers or {})} layers of '{self.model_type}')"


class TrimtabQuantizer(HfQuantizer):
    """Puts compressed layers into the empty model, lets transformers fill them, and checks what was read.

    Raises CheckpointError for a newer format, layers that do not fit the model, and tensors whose bytes are not those
    that were saved. Without `trimtab.json` beside the weights there are no checksums, and a warning says so.
    """

    requires_calibration = False
    quantization_config: TrimtabQuantizationConfig

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._manifest: dict[str, Any] | None = None
        self._source = ""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        check_version(config.format_version, config.trimtab_version, "the checkpoint")
        if not self.pre_quantized:
            raise CheckpointError(
                "transformers cannot compress with trimtab while it loads. Load the model, then call trimtab.compress."
            )
        if not isinstance(config.layers, Mapping) or not all(isinstance(v, Mapping) for v in config.layers.values()):
            raise CheckpointError("config.json is damaged: quantization_config has no table 'layers'.")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self._source = str(getattr(model.config, "name_or_path", "") or "the checkpoint")
        expected = self.quantization_config.model_type
        if expected and model.config.model_type != expected:
            raise CheckpointError(
                f"{self._source}: config.json describes a model of type '{model.config.model_type}', "
                f"but the compressed layers were saved from '{expected}'."
            )
        from trimtab.models.narrow import place_narrow  # which needs transformers' models

        place_narrow(model, self.quantization_config.narrow, self._source)
        layers = self._placed_layers(model)
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            self._check_stored([Path(file) for file in checkpoint_files], layers)
        for name, (parent, layer) in layers.items():
            setattr(parent, name.rpartition(".")[2], layer)
            # transformers initialises what no file holds, and GPT-2's blocks would reach for `c_proj.weight`
            parent._is_hf_initialized = True  # type: ignore[assignment]

    def _placed_layers(self, model: PreTrainedModel) -> dict[str, tuple[nn.Module, CompressedLinear]]:
        """Layer name in the checkpoint -> (parent module, empty compressed layer). Raises CheckpointError."""
        assert self.quantization_config.layers is not None
        modules = dict(model.named_modules())
        prefix = f"{model.base_model_prefix}."
        placed = {}
        for name, spec in self.quantization_config.layers.items():
            # a base model without head (AutoModel) holds the same layers without the prefix
            here = name if name in modules or not name.startswith(prefix) else name.removeprefix(prefix)
            dense = modules.get(here)
            if dense is None:
                raise CheckpointError(
                    f"{self._source}: the checkpoint has a compressed layer '{name}', which {type(model).__name__} of "
                    "config.json does not have. The configuration and the weights are of different models."
                )
            try:
                layer = CompressedLinear.empty(spec, dense.bias if hasattr(dense, "bias") else None)
            except CheckpointError as error:
                raise CheckpointError(f"{self._source}: layer '{name}': {error}") from None
            wanted, saved = _linear_shape(dense), (layer.out_features, layer.in_features)
            if wanted != saved:
                raise CheckpointError(
                    f"{self._source}: the compressed layer '{name}' is {list(saved)} ([out, in]), but in the model "
                    f"that config.json describes it is {list(wanted) if wanted else 'no linear layer'}."
                )
            placed[name] = (modules[here.rpartition(".")[0]], layer)
        return placed

    def _check_stored(self, files: list[Path], layers: Mapping[str, tuple[nn.Module, CompressedLinear]]) -> None:
        stored = read_headers(files)
        for name, (_, layer) in layers.items():
            for buffer, empty in layer.stored().items():
                _check_buffer(stored.get(f"{name}.{buffer}"), empty, f"{name}.{buffer}", self._source)
        self._manifest = read_manifest(files[0].parent) or self._remote_manifest()
        if self._manifest is None:
            warnings.warn(
                f"{self._source} has no {MANIFEST}, so its tensors are not checked against the saved checksums.",
                stacklevel=2,
            )
        else:
            check_tensors(stored, self._manifest, self._source)

    def _remote_manifest(self) -> dict[str, Any] | None:
        """`trimtab.json` from the hub, when weights came from there and only they were fetched."""
        from transformers.utils.hub import cached_file

        if Path(self._source).is_dir():
            return None
        path = cached_file(
            self._source,
            MANIFEST,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        return None if path is None else read_manifest(Path(path).parent)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, CompressedLinear) and not any(b.is_meta for b in module.stored().values()):
                try:
                    module.tensor.check()
                except CheckpointError as error:
                    raise CheckpointError(f"{self._source}: layer '{name}': {error}") from None
        if self._manifest is None:
            info_of(model)
        else:
            attach(model, info_from_manifest(self._manifest, self._source, model.dtype))
            self._manifest = None
        from trimtab.models.fast_decoding import fast_decoding  # which needs transformers' models

        fast_decoding(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _check_buffer(stored: StoredTensor | None, empty: torch.Tensor, name: str, source: str) -> None:
    if stored is None:
        raise CheckpointError(f"{source}: the weights lack '{name}', which the layer's spec needs.")
    if stored.shape != tuple(empty.shape) or stored.dtype != _SAFETENSORS_DTYPES.get(str(empty.dtype)):
        raise CheckpointError(
            f"{source}: '{name}' is {stored.dtype} {list(stored.shape)} in {stored.file.name}; "
            f"its spec in config.json wants {empty.dtype} {list(empty.shape)}."
        )


_SAFETENSORS_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer as Hugging Face models have them, None for another module."""
    from transformers.pytorch_utils import Conv1D

    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        return None
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
