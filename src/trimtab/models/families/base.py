"""The description of a family, and how a view is made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trimtab.core.errors import TargetError
from trimtab.models.views import AttentionView, BlockView, LinearView, MlpView, ModelView, Role, Rows, rows_in_order

_SITES: dict[Role, str] = {
    "q": "attention_in",
    "k": "attention_in",
    "v": "attention_in",
    "qkv": "attention_in",
    "o": "attention_out",
    "gate": "mlp_in",
    "up": "mlp_in",
    "gate_up": "mlp_in",
    "down": "mlp_out",
}

SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A small model with grouped heads, an odd vocabulary and widths that are multiples of 16 but not of 32."""


def _no_rows(config: PretrainedConfig) -> dict[Role, dict[str, Rows]]:
    return {}


def _no_refusal(config: PretrainedConfig) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family keeps its parts. The defaults are Llama's.

    name, model_type        of the family, and of its Hugging Face configuration
    blocks, final_norm, positions
                            paths from the model
    attention, mlp          paths from a block; an empty path is the block itself
    attention_linears, mlp_linears
                            path from the attention or MLP -> role, in the order of the computation
    *_norm                  paths from a block; q_norm and k_norm from the attention
    mlp_width               where the configuration has the width of the MLPs; nothing there: 4 x hidden_size (GPT-2)
    rows                    configuration -> role -> rows of its parts, for fused layers
    attention_arguments     attention module -> what it gives the attention function beside tensors, mask, dropout,
                            scaling and its own arguments; None if blocks have not the form of `kernels/block_step`
    refuses                 configuration -> why a model of it cannot be viewed, or None
    small                   configuration of a random small model, for tests and benchmarks
    """

    name: str
    model_type: str
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    positions: str | None = None
    attention: str = "self_attn"
    attention_linears: Mapping[str, Role] = field(
        default_factory=lambda: {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
    )
    attention_norm: str = "input_layernorm"
    attention_post_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    mlp: str = "mlp"
    mlp_linears: Mapping[str, Role] = field(
        default_factory=lambda: {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    )
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    mlp_width: str = "intermediate_size"
    unit_offset_norms: bool = False
    parallel: Callable[[PretrainedConfig], bool] = lambda config: False
    attention_arguments: Callable[[Any], dict[str, Any]] | None = None
    rows: Callable[[PretrainedConfig], Mapping[Role, Mapping[str, Rows]]] = _no_rows
    refuses: Callable[[PretrainedConfig], str | None] = _no_refusal
    small: Mapping[str, Any] = field(default_factory=dict)

    def view(self, model: PreTrainedModel) -> ModelView:
        """Raises TargetError if this model lacks a part that the family has."""
        config = model.config
        if refusal := self.refuses(config):
            raise TargetError(f"{type(model).__name__}: {refusal}")
        try:
            blocks = tuple(
                self._block(config, f"{self.blocks}.{index}", index, block)
                for index, block in enumerate(_children(model, self.blocks))
            )
            embedding = model.get_input_embeddings()
            head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
            final_norm = model.get_submodule(self.final_norm)
            positions = model.get_submodule(self.positions) if self.positions else None
        except (AttributeError, NotImplementedError) as error:
            raise TargetError(f"{type(model).__name__} is not laid out as family '{self.name}': {error}") from None
        if head is None:
            raise TargetError(f"{type(model).__name__} has no output head; load it as a causal language model.")
        return ModelView(model, self.name, blocks, embedding, final_norm, head, positions, self.unit_offset_norms)

    def width_of(self, config: PretrainedConfig) -> int:
        """Neurons of an MLP as the configuration has it."""
        return int(getattr(config, self.mlp_width, None) or 4 * config.hidden_size)

    def _block(self, config: PretrainedConfig, name: str, index: int, block: nn.Module) -> BlockView:
        attention, mlp = block.get_submodule(self.attention), block.get_submodule(self.mlp)
        narrow = hasattr(attention, "value_dim")  # see models/narrow.py
        head_dim = int(attention.head_dim) if narrow else head_dim_of(config)  # type: ignore[arg-type]
        rotary_dim = _rotary_dim(config, head_dim)
        attention_view = AttentionView(
            module=attention,
            linears=self._linears(config, attention, _join(name, self.attention), index, self.attention_linears),
            norm=block.get_submodule(self.attention_norm),
            num_heads=int(config.num_attention_heads),
            num_kv_heads=kv_heads_of(config),
            head_dim=head_dim,
            value_dim=int(attention.value_dim) if narrow else head_dim,  # type: ignore[arg-type]
            rotary=rotary_dim > 0,
            rotary_dim=rotary_dim,
            q_norm=_optional(attention, self.q_norm),
            k_norm=_optional(attention, self.k_norm),
            post_norm=_optional(block, self.attention_post_norm),
        )
        mlp_view = MlpView(
            module=mlp,
            linears=self._linears(config, mlp, _join(name, self.mlp), index, self.mlp_linears),
            norm=block.get_submodule(self.mlp_norm),
            gated=any(role in ("gate", "gate_up") for role in self.mlp_linears.values()),
            post_norm=_optional(block, self.mlp_post_norm),
        )
        return BlockView(index, name, block, attention_view, mlp_view, self.parallel(config))

    def _linears(
        self, config: PretrainedConfig, parent: nn.Module, name: str, block: int, linears: Mapping[str, Role]
    ) -> tuple[LinearView, ...]:
        rows = self.rows(config)

        def rows_of(path: str, role: Role) -> Mapping[str, Rows]:
            """A narrow gate_up is still two halves, whatever the configuration says of its width."""
            if role != "gate_up":
                return rows.get(role, {})
            half = int(parent.get_submodule(path).out_features) // 2  # type: ignore[arg-type]
            return rows_in_order(("gate", half), ("up", half))

        return tuple(
            LinearView(
                name=_join(name, path),
                role=role,
                site=f"layers.{block}.{_SITES[role]}",
                block=block,
                module=parent.get_submodule(path),
                parent=parent,
                transposed=isinstance(parent.get_submodule(path), Conv1D),
                rows=rows_of(path, role),
            )
            for path, role in linears.items()
        )


def _children(model: nn.Module, path: str) -> list[nn.Module]:
    return list(model.get_submodule(path).children())


def _join(name: str, path: str) -> str:
    return f"{name}.{path}" if path else name


def _optional(parent: nn.Module, path: str | None) -> nn.Module | None:
    return parent.get_submodule(path) if path else None


def head_dim_of(config: PretrainedConfig) -> int:
    """Dimensions of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotary_dim(config: PretrainedConfig, head_dim: int) -> int:
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return 0
    return int(head_dim * float(rope.get("partial_rotary_factor", 1.0)))


def kv_heads_of(config: PretrainedConfig) -> int:
    """Number of heads of keys and values."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def kv_width(config: PretrainedConfig) -> int:
    """Rows of a key or value projection."""
    return kv_heads_of(config) * head_dim_of(config)


def query_width(config: PretrainedConfig) -> int:
    """Rows of a query projection."""
    return int(config.num_attention_heads) * head_dim_of(config)
