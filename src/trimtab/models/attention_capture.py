"""See the queries, keys and values of every attention layer while a model reads, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from trimtab.models.attention import attention

_OBSERVED = "trimtab-observed"

Observer = Callable[[int, Tensor, Tensor, Tensor], None]
"""(layer, query [R, Hq, T, d], key [R, Hk, n, d], value [R, Hk, n, d]), rotated as attention sees them."""


@contextmanager
def observed_attention(model: PreTrainedModel, see: Observer) -> Iterator[None]:
    """Within, `see` is called with the tensors of each attention call; the results are as they were.

    The tensors are those of the computation, so a gradient can be asked for with `Tensor.register_hook`. The model's
    attention implementation is put back afterwards.
    """

    def observing(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        see(int(module.layer_idx), query, key, value)  # type: ignore[arg-type]
        return attention(module, query, key, value, *args, **kwargs)

    before = model.config.get_text_config()._attn_implementation
    AttentionInterface.register(_OBSERVED, observing)
    AttentionMaskInterface.register(_OBSERVED, sdpa_mask)
    model.set_attn_implementation(_OBSERVED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
