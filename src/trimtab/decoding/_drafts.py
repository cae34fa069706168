"""The models that draft, by the name that a method's `draft` option gives them."""

from __future__ import annotations

import copy
from typing import Literal

from transformers import PreTrainedModel

from trimtab.core.errors import CompositionError, ConfigError, TrimtabError
from trimtab.models import load, tokenizer_of
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.fast_decoding import fast_decoding
from trimtab.models.views import ModelView
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import MSE_SEARCH, GridFormat, GroupGrid

_SELF: dict[str, Literal[2, 3, 4, 8]] = {"self:2bit": 2, "self:3bit": 3, "self:4bit": 4, "self:8bit": 8}
_GROUP_SIZES = (64, 32, 16, 8)


def draft_model(name: str, target: PreTrainedModel) -> PreTrainedModel:
    """The model that this option names: one to load, or `self:2bit`, a copy of the target with smaller weights.

    Raises CompositionError if its tokens are not the target's, ConfigError for a copy in other bits than 2, 3, 4 or 8,
    and what loading raises.
    """
    if name.startswith("self:"):
        if name not in _SELF:
            raise ConfigError(f"draft '{name}' is none; a smaller copy of the model is {', '.join(_SELF)}.")
        return _smaller_copy(target, _SELF[name])
    draft = load(name, dtype=target.dtype, device=str(target.device))
    check_tokens(draft, target, name)
    return draft


def check_tokens(draft: PreTrainedModel, target: PreTrainedModel, name: str) -> None:
    """Raise CompositionError unless both models mean the same by each token id."""
    sizes = [int(model.config.get_text_config().vocab_size) for model in (draft, target)]
    if sizes[0] != sizes[1]:
        raise CompositionError(
            f"the draft '{name}' has {sizes[0]} tokens and the model {sizes[1]}; both need the same tokenizer."
        )
    try:
        own, other = (tokenizer_of(model).get_vocab() for model in (draft, target))
    except TrimtabError:
        return  # a model without a tokenizer: its ids mean what the other's do, for all that is known
    if own != other:
        different = sum(other.get(token) != index for token, index in own.items())
        raise CompositionError(
            f"the draft '{name}' and the model have different tokenizers: {different} tokens of the draft have another "
            "id or none. Take a draft with the model's own tokenizer."
        )


def _smaller_copy(target: PreTrainedModel, bits: Literal[2, 3, 4, 8]) -> PreTrainedModel:
    """The target with the linears of its blocks rounded to grids, the scales chosen for the least squared error."""
    draft = copy.deepcopy(target)
    for linear in ModelView.of(draft).linears:
        weight = linear.weight.detach().float()
        group = next((size for size in _GROUP_SIZES if weight.shape[1] % size == 0), -1)
        grid = GroupGrid.quantize(weight, GridFormat(bits=bits, group_size=group), MSE_SEARCH)
        linear.replace(CompressedLinear(CompressedTensor((grid,)), linear.bias))
    fast_decoding(draft)
    return draft
