"""Views: what a method sees of a Hugging Face model, the same for every family.

    ModelView -> BlockView -> AttentionView, MlpView -> LinearView

A view holds references, never copies. Weights are always shown as [out, in], also where the family stores them
transposed (GPT-2's Conv1D); fused layers (qkv, gate_up) are one LinearView whose `rows` name the slices.
A *site* is a distinct linear input: q, k and v share one, gate and up share one. Statistics are kept per site.
Views see the model as it was when they were made: after `replace`, make them again.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.core.errors import TargetError, did_you_mean
from trimtab.models.compressed_linear import CompressedLinear

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]
Rows = slice | Tensor
"""Rows of an [out, in] weight that belong together: a slice, or a 1-d index where they do not lie side by side."""
SITE_ORDER = ("attention_in", "attention_out", "mlp_in", "mlp_out")


@dataclass(frozen=True, slots=True)
class LinearView:
    """One linear layer of a block.

    name          dotted path in the model, e.g. `model.layers.0.self_attn.q_proj`
    role          what it computes; an ungated MLP has `up` and `down` only
    site          name of its input, e.g. `layers.0.attention_in`, shared by linears with the same input
    block         index of the block
    module        nn.Linear, Conv1D, or the CompressedLinear that replaced it
    parent        the module that holds it
    transposed    the module stores [in, out]
    rows          role -> rows of the [out, in] weight and of the bias, for fused layers:
                  {"q": slice(0, 256), "k": ...}. Each value indexes rows, `weight[rows["q"]]`; it is a slice where
                  the rows are adjacent and an int64 index where the family interleaves them by head (GPT-NeoX).
    """

    name: str
    role: Role
    site: str
    block: int
    module: nn.Module
    parent: nn.Module
    transposed: bool = False
    rows: Mapping[str, Rows] = field(default_factory=dict, compare=False)

    @property
    def compressed(self) -> CompressedLinear | None:
        """The compressed layer that stands here, or None if the weight is dense."""
        return self.module if isinstance(self.module, CompressedLinear) else None

    @property
    def weight(self) -> Tensor:
        """[out, in]; a detached view of the parameter's storage. Raises TargetError if the layer is compressed."""
        if isinstance(self.module, CompressedLinear):
            raise TargetError(
                f"{self.name} is already compressed; its dense weight is gone. "
                "Start from the uncompressed model, or read an approximation with module.dequantize()."
            )
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().t() if self.transposed else weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """[out], a detached view of the parameter's storage; None if the layer has none."""
        bias = self.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return None if bias is None else bias.detach()

    @property
    def out_features(self) -> int:
        return self.compressed.out_features if self.compressed else int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        return self.compressed.in_features if self.compressed else int(self.weight.shape[1])

    def set_weight(self, values: Tensor) -> None:
        """Copy `values` [out, in] into the parameter, cast to its dtype. Raises TargetError for another shape."""
        weight = self.weight
        if values.shape != weight.shape:
            raise TargetError(f"{self.name}: a weight of shape {list(values.shape)} does not fit {list(weight.shape)}.")
        weight.copy_(values)

    def replace(self, module: nn.Module) -> None:
        """Put `module` where this linear stands in the model. Views made before still show the old module."""
        setattr(self.parent, self.name.rpartition(".")[2], module)


@dataclass(frozen=True, slots=True)
class AttentionView:
    """The attention of a block.

    norm              its output is what q, k and v read
    rotary            queries and keys are rotated by position
    head_dim          of queries and keys; `value_dim` of values, which only narrow attention has different
    rotary_dim        leading dimensions of each head that are rotated, pairs (j, j + rotary_dim / 2); 0 if none
    q_norm, k_norm    norms of each head's query and key before rotation, where the family has them (Qwen3, Gemma 3)
    post_norm         norm between this attention and the residual stream, where there is one (Gemma 2 and 3)
    """

    module: nn.Module
    linears: tuple[LinearView, ...]
    norm: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    rotary: bool
    rotary_dim: int = 0
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    post_norm: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class MlpView:
    """The MLP of a block; `gated` if it computes down(act(gate x) * up x), else down(act(up x)).

    `norm` makes what its first linears read; `post_norm` stands between it and the residual stream (Gemma 2 and 3).
    `module` is the block itself where the family has no separate module (OPT).
    """

    module: nn.Module
    linears: tuple[LinearView, ...]
    norm: nn.Module
    gated: bool
    post_norm: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class BlockView:
    """One transformer block. `parallel`: attention and MLP both read the block's input (GPT-NeoX), not in turn."""

    index: int
    name: str
    module: nn.Module
    attention: AttentionView
    mlp: MlpView
    parallel: bool = False

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
    """A causal language model. Build with `ModelView.of(model)`.

    blocks              in the order of the forward pass
    embedding           token embedding
    positions           learned position embedding, if the family has one (OPT, GPT-2)
    final_norm          norm before the output head
    lm_head             output head; `tied_head` if it shares the embedding's storage
    unit_offset_norms   the block and final norms multiply by 1 + weight instead of weight (Gemma)
    """

    model: PreTrainedModel
    family: str
    blocks: tuple[BlockView, ...]
    embedding: nn.Module
    final_norm: nn.Module
    lm_head: nn.Module
    positions: nn.Module | None = None
    unit_offset_norms: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelView:
        """Raises TargetError naming the architecture if no family file knows it."""
        from trimtab.models.families import family_of  # the families build views, so they import this module

        return family_of(model).view(model)

    @property
    def tied_head(self) -> bool:
        head, embedding = self.lm_head.weight, self.embedding.weight
        assert isinstance(head, Tensor)
        assert isinstance(embedding, Tensor)
        return head is embedding or (head.device.type != "meta" and head.data_ptr() == embedding.data_ptr())

    @property
    def linears(self) -> tuple[LinearView, ...]:
        return tuple(linear for block in self.blocks for linear in block.linears)

    def select(self, patterns: tuple[str, ...] = ("*",)) -> tuple[LinearView, ...]:
        """Linears whose name, last name part or role matches a shell pattern, in model order.

        Raises TargetError for a pattern that matches nothing, with the closest names and their number of matches.
        """
        linears = self.linears
        for pattern in patterns:
            if not any(_matches(linear, pattern) for linear in linears):
                raise TargetError(_no_match(pattern, linears))
        return tuple(linear for linear in linears if any(_matches(linear, pattern) for pattern in patterns))


def _matches(linear: LinearView, pattern: str) -> bool:
    names = (linear.name, linear.name.rpartition(".")[2], linear.role)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _no_match(pattern: str, linears: tuple[LinearView, ...]) -> str:
    matches: dict[str, int] = {}
    for linear in linears:
        for name in {linear.name.rpartition(".")[2], linear.role}:
            matches[name] = matches.get(name, 0) + 1
    counts = {f"{name} ({count} matches)" for name, count in matches.items()}
    hint = did_you_mean(pattern, matches).partition(" Known:")[0] if "." not in pattern else ""
    for name, count in matches.items():
        hint = hint.replace(f"'{name}'", f"'{name}' ({count} matches)")
    hint = f"{hint} " if hint.startswith("Did") else ""
    return (
        f"no linear layer matches '{pattern}' ({len(linears)} searched). {hint}Known: {', '.join(sorted(counts))}. "
        "List the names with: trimtab modules MODEL"
    )


def rows_in_order(*parts: tuple[str, int]) -> dict[str, Rows]:
    """Rows of a fused layer whose parts lie one after another: (role, number of rows) each."""
    rows: dict[str, Rows] = {}
    start = 0
    for role, count in parts:
        rows[role] = slice(start, start + count)
        start += count
    return rows


def rows_by_head(roles: tuple[str, ...], num_heads: int, head_dim: int) -> dict[str, Rows]:
    """Rows of a fused layer that holds all roles of head 0, then all of head 1, and so on."""
    index = torch.arange(num_heads * len(roles) * head_dim).view(num_heads, len(roles), head_dim)
    return {role: index[:, position].reshape(-1) for position, role in enumerate(roles)}
