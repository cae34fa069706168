"""Layers that are narrower than the model's configuration says, and attention whose heads lost dimensions.

A model that was sliced to one width of all its MLPs is an ordinary smaller model, and its configuration says so
(`settle_widths`). What no configuration can say, a width for each block or heads without some of their dimensions, is
listed in `quantization_config` (`narrow_linears`) and put in place when a checkpoint is loaded (`place_narrow`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from trimtab.core.errors import CheckpointError, TargetError
from trimtab.models.families import family_by_type, family_of
from trimtab.models.families.base import head_dim_of, kv_heads_of
from trimtab.models.views import BlockView, LinearView, ModelView, Role

Narrow = dict[str, Any]
"""JSON values of one narrow linear: {"shape": [out, in], "bias": bool}."""


@dataclass(frozen=True, slots=True)
class HeadGeometry:
    """What is left of the dimensions of a block's heads.

    pairs        int64 [kv_heads, kept]: rotary pairs that each KV head and its queries keep, ascending; None: all.
                 Rows of the narrow q and k: in each head first the kept p, then the kept p + head_dim / 2
    value_dim    dimensions of a value; None: as before

    The scale of the scores stays that of the original head dimension.
    """

    pairs: Tensor | None = None
    value_dim: int | None = None


class NarrowAttention(nn.Module):
    """The forward of an attention whose heads lost rotary pairs or value dimensions; mixed into the family's class.

    head_dim     dimensions of a query and of a key
    value_dim    dimensions of a value
    pairs        int64 [kv_heads, head_dim / 2] buffer: which columns of the rotary tables they use; None: all
    """

    config: PretrainedConfig
    head_dim: int
    value_dim: int
    layer_idx: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    pairs: Tensor | None
    arguments: Callable[[Any], dict[str, Any]]
    eager: Callable[..., Any]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert position_embeddings is not None
        shape = hidden_states.shape[:-1]
        queries = self.q_proj(hidden_states).view(*shape, -1, self.head_dim)
        keys = self.k_proj(hidden_states).view(*shape, -1, self.head_dim)
        if (norm := self._modules.get("q_norm")) is not None:
            queries = norm(queries)
        if (norm := self._modules.get("k_norm")) is not None:
            keys = norm(keys)
        cos, sin = (self._of_pairs(table) for table in position_embeddings)
        queries, keys = _turned(queries.transpose(1, 2), cos, sin), _turned(keys.transpose(1, 2), cos, sin)
        values = self.v_proj(hidden_states).view(*shape, -1, self.value_dim).transpose(1, 2)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        cls = type(self)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, cls.eager)
        attended, weights = attend(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **cls.arguments(self),
            **kwargs,
        )
        return self.o_proj(attended.reshape(*shape, -1).contiguous()), weights

    def _of_pairs(self, table: Tensor) -> Tensor:
        """Rotary table [rows, tokens, 2 * all pairs] -> [rows, KV heads or 1, 1, tokens, pairs]."""
        half = table[..., : table.shape[-1] // 2]
        if self.pairs is None:
            return half[:, None, None]
        return half[:, :, self.pairs].permute(0, 2, 1, 3)[:, :, None]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [rows, heads, tokens, 2 * pairs] rotated by tables of the KV heads, as transformers does it."""
    grouped = x.unflatten(1, (cos.shape[1], -1))  # type: ignore[no-untyped-call]
    first, second = grouped.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(1, 2)


@functools.cache
def _narrow_class(cls: type[nn.Module], model_type: str) -> type[nn.Module]:
    """The family's attention with the forward of NarrowAttention: whoever looks for the family's class finds it."""
    arguments = family_by_type(model_type).attention_arguments
    assert arguments is not None, "check_narrows refuses these"
    content = {
        "__module__": __name__,
        "arguments": staticmethod(arguments),
        "eager": staticmethod(sys.modules[cls.__module__].eager_attention_forward),
    }
    return type(f"Narrow{cls.__name__}", (NarrowAttention, cls), content)


def check_narrows(model: PreTrainedModel, block: BlockView) -> None:
    """Raise TargetError if heads of this block cannot lose dimensions."""
    attention, family = block.attention, family_of(model)
    if family.attention_arguments is None or attention.rotary_dim != attention.head_dim:
        raise TargetError(
            f"{block.name}: the attention of {family.name} models cannot be made narrower (llama, mistral, qwen2 and "
            "qwen3 can). Leave it as it is; MLPs of every family can."
        )


def narrow_heads(attention: nn.Module, heads: HeadGeometry) -> None:
    """Make an attention, whose linears are narrow already, compute with what its heads have left."""
    if not isinstance(attention, NarrowAttention):
        config: Any = attention.config
        attention.__class__ = _narrow_class(type(attention), config.model_type)  # type: ignore[arg-type]
        assert isinstance(attention, NarrowAttention)
        attention.value_dim = attention.head_dim
        attention.register_buffer("pairs", None)
    if heads.pairs is not None:
        attention.head_dim = 2 * heads.pairs.shape[1]
        kept = (
            heads.pairs
            if attention.pairs is None
            else attention.pairs.gather(1, heads.pairs.to(attention.pairs.device))
        )
        attention.pairs = kept
    if heads.value_dim is not None:
        attention.value_dim = heads.value_dim


def narrow_linear(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of the kind of `module` (nn.Linear, Conv1D) with this weight [out, in] and bias, in its dtypes."""
    rows, columns = weight.shape
    old = module.weight
    assert isinstance(old, Tensor)
    made: nn.Module
    if isinstance(module, Conv1D):
        made = Conv1D(0, columns)  # type: ignore[no-untyped-call]
        made.nf, values = rows, weight.t()
    else:
        made = nn.Linear(columns, rows, bias=False, device="meta")
        values = weight
    made.weight = nn.Parameter(values.to(old).contiguous(), requires_grad=old.requires_grad)
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(old), old.requires_grad))
    return made.train(module.training)


def settle_widths(model: PreTrainedModel) -> None:
    """Write the width of the MLPs into the configuration, if all blocks have the same; transformers then loads the
    model without trimtab, unless its attention is narrow or layers are compressed."""
    view, family = ModelView.of(model), family_of(model)
    widths = {linear.in_features for linear in view.linears if linear.role == "down"}
    if len(widths) == 1:
        setattr(model.config, family.mlp_width, widths.pop())


def narrow_linears(model: PreTrainedModel) -> dict[str, Narrow]:
    """Name -> shape and bias of the linears of blocks that are not as the configuration says."""
    try:
        view, family = ModelView.of(model), family_of(model)
    except TargetError:  # of a family that has no views, which nothing can have made narrower
        return {}
    shapes = _shapes(model.config, family.width_of(model.config))
    changed = [
        linear
        for block in view.blocks
        for linear in (*_narrow_attention(block), *block.mlp.linears)
        if (linear.out_features, linear.in_features) != shapes[linear.role]
    ]
    return {
        linear.name: {"shape": [linear.out_features, linear.in_features], "bias": linear.module.bias is not None}
        for linear in changed
    }


def _narrow_attention(block: BlockView) -> tuple[LinearView, ...]:
    return block.attention.linears if isinstance(block.attention.module, NarrowAttention) else ()


def _shapes(config: PretrainedConfig, width: int) -> dict[Role, tuple[int, int]]:
    """[out, in] of the linears of a block as the configuration has them."""
    hidden, head = int(config.hidden_size), head_dim_of(config)
    queries, keys = int(config.num_attention_heads) * head, kv_heads_of(config) * head
    return {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "gate": (width, hidden),
        "up": (width, hidden),
        "gate_up": (2 * width, hidden),
        "down": (hidden, width),
    }


def place_narrow(model: PreTrainedModel, narrow: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """Put empty narrow layers where `narrow_linears` found some, to be filled by a loader. Raises CheckpointError."""
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    attentions: dict[str, nn.Module] = {}
    for name, entry in narrow.items():
        here = name if name in modules or not name.startswith(prefix) else name.removeprefix(prefix)
        parent_name, _, last = here.rpartition(".")
        old, parent = modules.get(here), modules.get(parent_name)
        if parent is None or not isinstance(old, (nn.Linear, Conv1D)) or not _is_entry(entry):
            raise CheckpointError(
                f"{source}: the checkpoint has a narrow layer '{name}' ({entry}), which does not fit "
                f"{type(model).__name__} of config.json."
            )
        weight = torch.empty(entry["shape"], device="meta", dtype=old.weight.dtype)
        bias = torch.empty(entry["shape"][0], device="meta", dtype=old.weight.dtype) if entry["bias"] else None
        setattr(parent, last, narrow_linear(old, weight, bias))
        if hasattr(parent, "layer_idx") and hasattr(parent, "scaling"):
            attentions[parent_name] = parent
    for attention in attentions.values():
        narrow_heads(attention, _geometry(attention))


def _geometry(attention: Any) -> HeadGeometry:
    """The geometry of an attention whose linears are narrow; its pairs are to be filled."""
    config = attention.config
    pairs = _rows(attention.k_proj) // (2 * kv_heads_of(config))
    value_dim = _rows(attention.v_proj) // kv_heads_of(config)
    whole = pairs == head_dim_of(config) // 2
    empty = torch.empty(kv_heads_of(config), pairs, dtype=torch.int64, device="meta")
    return HeadGeometry(None if whole else empty, value_dim)


def _rows(linear: nn.Module) -> int:
    return int(linear.out_features)  # type: ignore[arg-type]


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, Mapping)
        and set(entry) == {"shape", "bias"}
        and isinstance(entry["shape"], list)
        and len(entry["shape"]) == 2
        and all(type(n) is int and n > 0 for n in entry["shape"])
    )
