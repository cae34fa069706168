"""What a cache method decides: how the keys and values of each head are kept. The rest is the same for all methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels.kv_attention import Run


class Codec(Protocol):
    """Turns exact tokens into runs. `trimtab.tensors.kv.KVCodec` is the one that all methods configure."""

    def encode(
        self,
        x: Tensor,
        *,
        first_position: Sequence[int] | None = None,
        prefill: bool = False,
        override_tokens: Sequence[Tensor | None] | None = None,
        override_values: Sequence[Tensor | None] | None = None,
    ) -> list[Run]:
        """x [R, H, m, d] -> one run for each of the R rows.

        first_position     set if x are keys before rotary embedding: the position of the first token of each row
        prefill            x is a prompt, not a block of generated tokens (GEAR gives it a higher rank)
        override_tokens    for each row, tokens that stay exact: ascending indices, or None
        override_values    for each row, their values [H, p, d], keys after rotary embedding
        """
        ...

    def check_shape(self, heads: int, head_dim: int) -> None:
        """Raise ConfigError if tokens of so many heads and dimensions cannot be encoded."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class TensorPlan:
    """How the keys, or the values, of some heads are kept.

    codec      of the tokens that have left the window
    window     the last so many tokens stay exact
    block      tokens are encoded in multiples of this number, oldest first: up to block - 1 more stay exact
    pre_rope   keys are stored as they were before rotary embedding
    """

    codec: Codec
    window: int = 0
    block: int = 128
    pre_rope: bool = False

    def __post_init__(self) -> None:
        if self.window < 0 or self.block < 1:
            raise ConfigError(f"a cache keeps window >= 0 and block >= 1 tokens, not {self.window} and {self.block}.")


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadPlan:
    """How some KV heads of a layer are kept. They hold the same tokens.

    heads       KV heads, ascending
    sinks       the first so many tokens stay exact for ever
    recent      keep only the sinks and this many of the latest tokens (None: all)
    positions   "text": a key has the position of its token in the text. "cache": it has its index in the cache, as in
                StreamingLLM; queries follow
    pivots      this many of the largest entries of the block's input mark tokens of a prompt that stay exact (RotateKV)
    """

    heads: tuple[int, ...]
    keys: TensorPlan
    values: TensorPlan
    sinks: int = 0
    recent: int | None = None
    positions: Literal["text", "cache"] = "text"
    pivots: int = 0


@dataclass(frozen=True, eq=False)
class CachePlan:
    """The plan of a model's cache: for each layer, the groups of heads, which together are all KV heads.

    name      of the method, for messages and files
    options   its options, for files
    """

    layers: tuple[tuple[HeadPlan, ...], ...]
    name: str = "exact"
    options: dict[str, object] = field(default_factory=dict)

    def check(self, num_layers: int, num_kv_heads: Sequence[int], head_dims: Sequence[int]) -> None:
        """Raise ConfigError if the plan is not one for a model of this shape."""
        if len(self.layers) != num_layers:
            raise ConfigError(f"cache '{self.name}' plans {len(self.layers)} layers; the model has {num_layers}.")
        for index, groups in enumerate(self.layers):
            heads = sorted(head for group in groups for head in group.heads)
            if heads != list(range(num_kv_heads[index])):
                raise ConfigError(
                    f"cache '{self.name}', layer {index}: the plan holds KV heads {heads}, the layer has "
                    f"{num_kv_heads[index]}."
                )
            for group in groups:
                for plan in (group.keys, group.values):
                    plan.codec.check_shape(len(group.heads), head_dims[index])

    @property
    def needs_rope(self) -> bool:
        """Some keys are stored before rotary embedding, or have positions of their own."""
        return any(g.keys.pre_rope or g.positions == "cache" for layer in self.layers for g in layer)
