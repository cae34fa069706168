"""SegmentCache: a transformers cache that keeps its history encoded, and can be rolled back."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from typing_extensions import Self

from trimtab.core.errors import CompositionError, ConfigError, DataError, TargetError
from trimtab.models.attention import BACKEND, use_backend
from trimtab.models.fast_linear import use_fast_linear
from trimtab.models.segments.layer import SegmentLayer
from trimtab.models.segments.pivots import watch_inputs
from trimtab.models.segments.plan import CachePlan
from trimtab.models.segments.rope import RopeSource
from trimtab.models.views import ModelView


class SegmentCache(Cache):
    """Keys and values of a text as segments: sinks, encoded history, a filling block, a window of exact tokens.

    Use it as any transformers cache: `model(ids, past_key_values=cache)`, `model.generate(..., past_key_values=cache)`,
    beam search and padded batches included. Padding is never stored; each row has its own length.

    Making one sets the model's attention implementation to "trimtab", which attends to the encoded history as it is
    and computes what transformers does for everything else. With another implementation the cache hands out decoded
    tensors: the same results, slowly. It also lets 16-bit linear layers on the CPU read their weights at the speed of
    memory when few tokens come (`use_fast_linear`), since decoding is as fast as the slower of the two.

    Transactions: after `begin()`, new tokens are drafts, which later queries see as their mask says; `commit(chosen)`
    keeps some of them, `rollback()` none. Encoded tokens never change, so `fork()` shares them.

    key_bias   layer -> float32 [R, Hq, n]: added to the attention scores of the n oldest keys held
    positions  tokens that a text may have; None: any number, as where positions do not grow

    Raises ConfigError if the plan does not fit the model, TargetError for an unknown family or one without the rotary
    positions that the plan needs.
    """

    def __init__(self, model: PreTrainedModel, plan: CachePlan) -> None:
        view = ModelView.of(model)
        heads = [block.attention.num_kv_heads for block in view.blocks]
        for block in view.blocks:
            if block.attention.value_dim != block.attention.head_dim:
                raise TargetError(
                    f"{block.name} has keys of {block.attention.head_dim} and values of {block.attention.value_dim} "
                    "dimensions, which this cache keeps in one form. Remove as many of both, or generate without it."
                )
        plan.check(len(view.blocks), heads, [block.attention.head_dim for block in view.blocks])
        self.plan = plan
        self.key_bias: dict[int, Tensor] = {}
        self._model = weakref.ref(model)
        self._config: Any = model.config.get_text_config()
        self.positions = _position_limit(self._config, plan)
        use_backend(model)
        use_fast_linear(model)
        ropes: list[RopeSource | None] = [None] * len(plan.layers)
        if plan.needs_rope:
            sources = [RopeSource(model, index) for index in range(len(plan.layers))]
            shared = {source.kind: source for source in sources}
            ropes = [shared[source.kind] for source in sources]
        layers = [SegmentLayer(self, index, groups, ropes[index]) for index, groups in enumerate(plan.layers)]
        super().__init__(layers=list(layers))
        if any(group.pivots for groups in plan.layers for group in groups):
            watch_inputs(model)

    @property
    def segment_layers(self) -> list[SegmentLayer]:
        return self.layers  # type: ignore[return-value]

    @property
    def model(self) -> PreTrainedModel:
        """The model it was made for. Raises CompositionError if that is gone."""
        model = self._model()
        if model is None:
            raise CompositionError("the model that this cache was made for no longer exists.")
        return model

    def has_backend(self) -> bool:
        """The model attends through our backend, so encoded tokens need not be decoded for it."""
        return bool(self._config._attn_implementation == BACKEND)

    def check_length(self, length: int) -> None:
        """Raise DataError if the model has no position for the last of so many tokens."""
        if self.positions is not None and length > self.positions:
            raise DataError(
                f"the text has grown to {length} tokens, but the model has positions for {self.positions}. Use a "
                "shorter text, or the cache 'streaming', whose positions do not grow."
            )

    def note_inputs(self, layer: int, hidden: Tensor) -> None:
        """Called with what enters a block when more than one token does: marks the tokens that stay exact."""
        self.segment_layers[layer].note_inputs(hidden)

    # Batches.

    @property
    def batch_size(self) -> int:
        return self.segment_layers[0].rows or -1

    # Transactions.

    def begin(self) -> None:
        """From now on new tokens are drafts. Raises CompositionError if they are already."""
        if self.in_transaction:
            raise CompositionError("a draft is open already; commit or roll it back first.")
        for layer in self.segment_layers:
            layer.begin()

    @property
    def in_transaction(self) -> bool:
        return self.segment_layers[0].draft is not None

    def commit(self, chosen: Tensor | Sequence[Sequence[int]] | None = None) -> None:
        """Keep drafted tokens, in the order given, and drop the others.

        chosen   for each row, indices of drafted tokens counted from `begin()`: a path of the draft tree. A 1-d tensor
                 is a path for all rows; None keeps all

        Raises CompositionError without an open draft, and DataError, keeping the draft open, for an index that was not
        drafted or, where keys are kept before rotary embedding, a path whose positions do not follow each other.
        """
        self._check_open()
        layer = self.segment_layers[0]
        assert layer.draft is not None
        drafted, rows = layer.length - layer.draft.length, layer.rows
        if isinstance(chosen, Tensor):
            chosen = [chosen.tolist()] * rows if chosen.ndim == 1 else chosen.tolist()
        if chosen is not None and len(chosen) != rows:
            raise DataError(f"commit got paths for {len(chosen)} rows; the cache holds {rows}.")
        for path in chosen or ():
            if any(not 0 <= index < drafted for index in path):
                raise DataError(f"commit: path {list(path)} leaves the {drafted} drafted tokens, 0 to {drafted - 1}.")
        for each in self.segment_layers:
            each.finish(None if chosen is None else [list(path) for path in chosen])

    def rollback(self) -> None:
        """Drop all drafted tokens: the cache is what it was at `begin()`. Raises CompositionError without a draft."""
        self._check_open()
        self.commit([[] for _ in range(self.segment_layers[0].rows)])

    def _check_open(self) -> None:
        if not self.in_transaction:
            raise CompositionError("no draft is open; call begin() before the tokens that may be taken back.")

    def fork(self) -> Self:
        """An independent cache with the same content. Encoded tokens are shared, which is safe: they never change."""
        if self.in_transaction:
            raise CompositionError("a draft is open; commit or roll it back before fork().")
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.key_bias = dict(self.key_bias)
        other.layers = [layer.copy_for(other) for layer in self.segment_layers]
        return other

    def snapshot(self) -> Self:
        """What `restore` goes back to."""
        return self.fork()

    def restore(self, snapshot: SegmentCache) -> None:
        """Become what the snapshot holds; the snapshot stays usable. Raises ConfigError for one of another plan."""
        if snapshot.plan is not self.plan:
            raise ConfigError("a cache can only be restored to a snapshot of its own.")
        self.key_bias = dict(snapshot.key_bias)
        self.layers = [layer.copy_for(self) for layer in snapshot.segment_layers]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last |tokens_to_remove| tokens. Raises CompositionError, changing nothing, if some are encoded."""
        for layer in self.segment_layers:
            layer.check_crop(abs(tokens_to_remove))
        super().crop(tokens_to_remove)

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Make row i what row rows[i] was, for beams."""
        self.reorder_cache(torch.as_tensor(rows, dtype=torch.long))  # type: ignore[arg-type]

    def __deepcopy__(self, memo: object) -> Self:
        return self.fork()

    # Bytes.

    def tensors(self) -> Iterator[Tensor]:
        """All tensors held; shared ones may come more than once."""
        for layer in self.segment_layers:
            for group in layer.groups:
                for side in group.sides:
                    yield from side.tensors()

    def nbytes(self) -> int:
        """Allocated bytes: every storage that the cache holds, once, whole, whatever part of it is in use."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors() if t.numel()}
        return sum(storages.values())

    def bytes_by_part(self) -> Mapping[str, int]:
        """Bytes of runs by what they hold, and of windows; shared tensors once."""
        found: dict[str, int] = {}
        seen: set[tuple[int, int]] = set()

        def count(name: str, tensor: Tensor) -> None:
            key = (tensor.untyped_storage().data_ptr(), tensor.data_ptr())
            if tensor.numel() and key not in seen:
                seen.add(key)
                found[name] = found.get(name, 0) + tensor.numel() * tensor.element_size()

        for layer in self.segment_layers:
            for group in layer.groups:
                for kind, side in zip(("keys", "values"), group.sides, strict=True):
                    count(f"window of {kind}", side.buffer)
                    for runs in side.runs:
                        for run in runs:
                            for name, tensor in run.tensors().items():
                                count(name, tensor)
        return found

    @property
    def tokens(self) -> int:
        """Tokens held by the longest row of the layer that holds most."""
        counts = [g.tokens(r) for layer in self.segment_layers for g in layer.groups for r in range(g.rows)]
        return max(counts, default=0)


def _position_limit(config: Any, plan: CachePlan) -> int | None:
    """Tokens that a model of this text configuration has positions for; None: any number."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None or all(group.positions == "cache" for groups in plan.layers for group in groups):
        return None
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [p for p in (parameters, *parameters.values()) if isinstance(p, dict)]
    return math.ceil(limit * max(map(_growth, kinds), default=1.0))


def _growth(parameters: dict[str, Any]) -> float:
    """By how much rotary scaling extends max_position_embeddings; most kinds have done so in the configuration."""
    kind = parameters.get("rope_type")
    grows = kind in ("linear", "dynamic") or (kind == "yarn" and "original_max_position_embeddings" not in parameters)
    return float(parameters.get("factor") or 1.0) if grows else 1.0
