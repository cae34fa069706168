"""Views: what a method sees of a Hugging Face model, the same for every family.

    ModelView -> BlockView -> AttentionView, MlpView -> LinearView

A view holds references, never copies. Weights are always shown as [out, in], also where the family stores them
transposed (GPT-2's Conv1D); fused layers (qkv, gate_up) are one LinearView whose `rows` name the slices.
A *site* is a distinct linear input: q, k and v share one, gate and up share one. Statistics are kept per site.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]
SITE_ORDER = ("attention_in", "attention_out", "mlp_in", "mlp_out")


@dataclass(frozen=True, slots=True)
class LinearView:
    """One linear layer of a block.

    name          dotted path in the model, e.g. `model.layers.0.self_attn.q_proj`
    role          what it computes; an ungated MLP has `up` and `down` only
    site          name of its input, e.g. `layers.0.attention_in`, shared by linears with the same input
    block         index of the block
    module        nn.Linear, Conv1D, or the CompressedLinear that replaced it
    transposed    the module stores [in, out]
    rows          role -> rows of the [out, in] weight, for fused layers: {"q": slice(0, 256), "k": ...}
    """

    name: str
    role: Role
    site: str
    block: int
    module: nn.Module
    parent: nn.Module
    transposed: bool = False
    rows: dict[str, slice] = field(default_factory=dict)

    @property
    def weight(self) -> Tensor:
        """[out, in]; a view of the parameter. Raises TargetError if the layer is already compressed."""
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    def replace(self, module: nn.Module) -> None:
        """Put `module` where this linear stands in the model."""
        setattr(self.parent, self.name.rpartition(".")[2], module)


@dataclass(frozen=True, slots=True)
class AttentionView:
    """The attention of a block. `q_norm`, `k_norm` where the family has them (Qwen3, Gemma 3)."""

    module: nn.Module
    linears: tuple[LinearView, ...]
    norm: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: bool
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class MlpView:
    """The MLP of a block; `gated` if it computes down(act(gate x) * up x)."""

    module: nn.Module
    linears: tuple[LinearView, ...]
    norm: nn.Module
    gated: bool


@dataclass(frozen=True, slots=True)
class BlockView:
    index: int
    name: str
    module: nn.Module
    attention: AttentionView
    mlp: MlpView

    @property
    def linears(self) -> tuple[LinearView, ...]:
        return self.attention.linears + self.mlp.linears

    @property
    def sites(self) -> dict[str, tuple[LinearView, ...]]:
        """Site name -> linears reading it, in the order of the computation."""
        grouped: dict[str, list[LinearView]] = {}
        for linear in self.linears:
            grouped.setdefault(linear.site, []).append(linear)
        return {site: tuple(members) for site, members in grouped.items()}


@dataclass(frozen=True, slots=True)
class ModelView:
    """A causal language model. Build with `ModelView.of(model)`."""

    model: PreTrainedModel
    family: str
    blocks: tuple[BlockView, ...]
    embedding: nn.Module
    final_norm: nn.Module
    lm_head: nn.Module

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelView:
        """Raises TargetError naming the architecture if no family file knows it."""
        raise NotImplementedError

    @property
    def linears(self) -> tuple[LinearView, ...]:
        return tuple(linear for block in self.blocks for linear in block.linears)

    def select(self, patterns: tuple[str, ...] = ("*",)) -> tuple[LinearView, ...]:
        """Linears whose name, last name part or role matches a shell pattern, in model order.

        Raises TargetError for a pattern that matches nothing, with the closest names and their number of matches.
        """
        raise NotImplementedError
