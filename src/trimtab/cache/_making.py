"""From a method and a model to a cache: shapes, what was fitted, the plan."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

from trimtab.cache.base import CacheMethod, Fitted, LayerShape
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.info import info_of, tokenizer_of
from trimtab.models.segments import CachePlan, RopeSource, SegmentCache
from trimtab.models.views import ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEQUENCES, LENGTH = 64, 512
"""Calibration text of a method that is fitted on the way: 32,768 tokens, as the papers' 16 x 2,048."""


def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """What methods see of each attention layer. Raises TargetError for an unknown family."""
    blocks = ModelView.of(model).blocks
    return [
        LayerShape(b.index, len(blocks), b.attention.num_heads, b.attention.num_kv_heads, b.attention.head_dim)
        for b in blocks
    ]


def cache_plan(method: CacheMethod, model: PreTrainedModel) -> CachePlan:
    """The plan of a method for a model, fitted if need be."""
    fitted = fit(method, model)
    layers = tuple(method.plans(layer_shapes(model), fitted))
    plan = CachePlan(layers, name=type(method).name(), options=method.to_dict())
    if plan.needs_rope:
        RopeSource(model, 0)  # refuses before anything else is made
    return plan


def new_cache(method: CacheMethod, model: PreTrainedModel) -> SegmentCache:
    """See `CacheMethod.new`."""
    return SegmentCache(model, cache_plan(method, model))


def fitted_key(method: CacheMethod) -> str:
    """Under which name a model keeps what was fitted: the method, and a digest of the options that count."""
    options = json.dumps(dict(method.fit_options()), sort_keys=True)
    return f"{type(method).name()}-{hashlib.sha256(options.encode()).hexdigest()[:12]}"


def fit(method: CacheMethod, model: PreTrainedModel, calibration: CalibrationSet | None = None) -> Fitted:
    """What the method has learnt for this model; fitted now if that has not been done, or if text is given.

    The model keeps it, `tt.save` writes it, and `tt.load` reads it. Empty for a method that learns nothing.
    """
    if not method.calibrated:
        return {}
    known = info_of(model).fitted_caches
    key = fitted_key(method)
    if key not in known or calibration is not None:
        if calibration is None:
            calibration = CalibrationSet.from_text(None, tokenizer_of(model), sequences=SEQUENCES, length=LENGTH)
        with torch.inference_mode(False), torch.no_grad():  # what is learnt outlives the caller's mode
            known[key] = method.fit(model, calibration)
    return known[key]
