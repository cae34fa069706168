"""The other models of a generation, by the names that options of methods give them."""

from __future__ import annotations

import copy
from typing import Literal

from transformers import PreTrainedModel

from trimtab.core.errors import CompositionError, ConfigError, TrimtabError
from trimtab.core.progress import progress
from trimtab.models import load, tokenizer_of
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.fast_decoding import fast_decoding
from trimtab.models.views import ModelView
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import ClipSearch, GridFormat, GroupGrid

_SELF: dict[str, Literal[2, 3, 4, 8]] = {"self:2bit": 2, "self:3bit": 3, "self:4bit": 4, "self:8bit": 8}
_GROUP_SIZES = (64, 32, 16, 8)
_SEARCH = ClipSearch(grid=10, max_shrink=0.4, norm=2.0)
"""Of 2 bits, where it matters; few steps, since a copy is made while somebody waits, and it only has to guess."""


def named_model(name: str, target: PreTrainedModel) -> PreTrainedModel:
    """The model that an option names: one to load, or `self:2bit`, a copy of the target with smaller weights.

    Raises ConfigError for a copy in other bits than 2, 3, 4 or 8, and what loading raises.
    """
    if name.startswith("self:"):
        if name not in _SELF:
            raise ConfigError(f"model '{name}' is none; a smaller copy of the model itself is {', '.join(_SELF)}.")
        return _smaller_copy(target, _SELF[name])
    return load(name, dtype=target.dtype, device=str(target.device))


def check_tokens(other: PreTrainedModel, target: PreTrainedModel, name: str) -> None:
    """Raise CompositionError unless both models mean the same by each token id."""
    if difference := token_difference(other, target):
        raise CompositionError(f"'{name}' must have the tokenizer of the model that decodes: {difference}.")


def token_difference(other: PreTrainedModel, target: PreTrainedModel) -> str | None:
    """What two models do not mean alike by token ids; None if they agree, or have no tokenizers that could differ."""
    sizes = [int(model.config.get_text_config().vocab_size) for model in (other, target)]
    if sizes[0] != sizes[1]:
        return f"it has {sizes[0]} tokens, and that model has {sizes[1]}"
    try:
        own, wanted = (tokenizer_of(model).get_vocab() for model in (other, target))
    except TrimtabError:
        return None
    different = sum(wanted.get(token) != index for token, index in own.items())
    return f"{different} of its tokens have another id there, or none" if own != wanted else None


def _smaller_copy(target: PreTrainedModel, bits: Literal[2, 3, 4, 8]) -> PreTrainedModel:
    """The target with the linears of its blocks rounded to grids."""
    draft = copy.deepcopy(target)
    linears = list(ModelView.of(draft).linears)
    with progress(f"a copy in {bits} bits", len(linears)) as advance:
        for linear in linears:
            weight = linear.weight.detach().float()
            group = next((size for size in _GROUP_SIZES if weight.shape[1] % size == 0), -1)
            grid = GroupGrid.quantize(weight, GridFormat(bits=bits, group_size=group), _SEARCH if bits == 2 else None)
            linear.replace(CompressedLinear(CompressedTensor((grid,)), linear.bias))
            advance("")
    fast_decoding(draft)
    return draft
