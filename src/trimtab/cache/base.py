"""The contract of the cache room: for each layer, how the keys and values of each KV head are kept.

A method says what is stored (a codec, a window, sinks); appending, positions, padding, beams, transactions, files and
attention are `models/segments`, the same for all.

    cache = Kivi(bits=2).new(model)
    model.generate(ids, past_key_values=cache)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.core.method import Method

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trimtab.models.calibration_set import CalibrationSet
    from trimtab.models.segments import HeadPlan, SegmentCache

Fitted = Mapping[str, "Tensor"]
"""What a method learns once from calibration text: name -> tensor."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a method sees of an attention layer.

    index, layers           which of how many
    heads, kv_heads         query heads and KV heads; query head h reads KV head h // (heads // kv_heads)
    head_dim                dimensions of a head
    """

    index: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def all_heads(self) -> tuple[int, ...]:
        return tuple(range(self.kv_heads))


@dataclass(frozen=True, kw_only=True)
class CacheMethod(Method):
    """A way to keep keys and values. One subclass per file."""

    room: ClassVar[str] = "cache"
    calibrated: ClassVar[bool] = False
    """It learns tables from calibration text: `fit` is called once per model, and its result kept with the model."""

    @abstractmethod
    def head_plans(self, layer: LayerShape, fitted: Fitted) -> tuple[HeadPlan, ...]:
        """How this layer is kept; the groups together are all its KV heads.

        `fitted` is empty unless the method is calibrated. Raises ConfigError for options that do not fit the shape.
        """

    def plans(self, layers: Sequence[LayerShape], fitted: Fitted) -> list[tuple[HeadPlan, ...]]:
        """`head_plans` of all layers; a method that weighs layers against each other overrides this one."""
        return [self.head_plans(layer, fitted) for layer in layers]

    def fit(self, model: PreTrainedModel, calibration: CalibrationSet) -> dict[str, Tensor]:
        """What is learnt from calibration text, as tensors to store; only calibrated methods have something."""
        return {}

    def fit_options(self) -> Mapping[str, object]:
        """The options that `fit` depends on: methods that differ in others share what was learnt."""
        return self.to_dict()

    def new(self, model: PreTrainedModel) -> SegmentCache:
        """An empty cache for this model, to be given as `past_key_values`.

        A calibrated method takes what was fitted for the model and these options before, in this process or in the
        checkpoint it was loaded from; the first time it fits on the calibration text that comes with trimtab.
        Raises ConfigError if the options do not fit the model, TargetError if the model lacks what the method needs.
        """
        from trimtab.cache._making import new_cache

        return new_cache(self, model)
