"""transformers' own model, as torch computes it or with its linear layers quantized by another library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import DynamicCache

from trimtab import models
from trimtab.evaluation.kv_decode.torch_sessions import TorchSession, tensor_bytes
from trimtab.evaluation.weight_decode.measure import Setting
from trimtab.evaluation.weight_decode.quantizing import QUANTIZERS, weight_tensors


class WeightSession(TorchSession):
    """A torch session that knows how many bytes of weights a step reads."""

    def weight_bytes(self) -> int:
        """Storage of everything that stands for weights, each once."""
        return tensor_bytes(weight_tensors(self._model))

    def embedding_bytes(self) -> int:
        """Of the embedding; 0 if it is the output matrix too."""
        model: Any = self._model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        return 0 if head is not None and head.weight is embedding.weight else int(embedding.weight.nbytes)


def open_peer(directory: Path, setting: Setting, *, name: str) -> WeightSession:
    """The model with the linear layers of the system `name`."""
    model = models.load(directory)
    library, quantize = QUANTIZERS[name]
    quantize(model)
    return WeightSession(model, lambda: DynamicCache(config=model.config), library=library)
