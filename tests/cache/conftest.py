"""Small models with heads that all methods can take, a trained one, and caches for them, fitted once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.cache._files import model_fingerprint
from trimtab.cache._making import fit, fitted_key, layer_shapes
from trimtab.cache.base import CacheMethod
from trimtab.core.registry import method_class
from trimtab.kernels.kv_attention.reference import decode
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.info import info_of, tokenizer_of
from trimtab.models.random import random_model
from trimtab.models.segments import SegmentCache

from .cases import PROMPT

POSITIONS = 512
_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 128, "n_positions": POSITIONS},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128},
    "gpt_neox": {"hidden_size": 128},
    "phi3": {"hidden_size": 128},
}
_FITTED: dict[tuple[str, str], Any] = {}


@pytest.fixture(scope="session")
def mini() -> PreTrainedModel:
    """The small trained model: 3 layers, 2 query heads, 1 KV head of 64. Not to be changed."""
    model = tt.load("ref-mini", dtype=torch.float32)
    model.requires_grad_(False)
    return model


@pytest.fixture(scope="session")
def prose(mini: PreTrainedModel) -> Tensor:
    """Text that no method is fitted on, int64 [4, 320]."""
    text = (resources.files("trimtab") / "assets" / "text" / "prose_eval.txt").read_text(encoding="utf-8")
    ids = tokenizer_of(mini)(text[:40_000], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: 4 * 320]).view(4, 320)


@pytest.fixture(scope="session")
def fit_text(mini: PreTrainedModel) -> CalibrationSet:
    """2,048 tokens of the calibration prose."""
    return CalibrationSet.from_text(None, tokenizer_of(mini), sequences=8, length=256)


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def tiny(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    """A random model with heads of 32 channels and 512 positions."""
    own = _SIZES.get(family, {"head_dim": 32})
    if family != "gpt2":
        own = {**own, "max_position_embeddings": POSITIONS}
    return random_model(family, **{**own, **overrides})


def tokens(rows: int, length: int, seed: int = 1, vocabulary: int = 131) -> Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def calibration(rows: int = 12, length: int = 64) -> CalibrationSet:
    return CalibrationSet.from_tokens(tokens(rows, length, seed=7), source="random tokens")


def calibration_for(method: CacheMethod) -> CalibrationSet:
    """Random tokens; texts that are long beside its blocks for the method that measures what windows save."""
    return calibration(3, 384) if type(method).name() == "auto" else calibration()


def build(name: str, options: dict[str, Any]) -> CacheMethod:
    method = method_class(name)(**options)
    assert isinstance(method, CacheMethod)
    return method


def fitted(model: PreTrainedModel, method: CacheMethod) -> CacheMethod:
    """The method, fitted for the model on random tokens unless that was done before for an equal one."""
    if not method.calibrated:
        return method
    key = fitted_key(method)
    place = model_fingerprint(model), key
    known = info_of(model).fitted_caches
    if place not in _FITTED:
        if type(method).name() == "retrieval_heads":  # a random model retrieves nothing
            shapes = layer_shapes(model)
            drawn = torch.rand(len(shapes), shapes[0].kv_heads, generator=torch.Generator().manual_seed(3))
            known[key] = {"scores": drawn, "sums": drawn}
        else:
            fit(method, model, calibration_for(method))
        _FITTED[place] = known[key]
    known[key] = _FITTED[place]
    return method


def new_cache(model: PreTrainedModel, name: str, options: dict[str, Any]) -> SegmentCache:
    return fitted(model, build(name, options)).new(model)


def feed(model: PreTrainedModel, cache: SegmentCache, ids: Tensor, sizes: list[int], **more: Tensor) -> Tensor:
    """Logits of ids, read in chunks of these sizes."""
    parts, begin = [], 0
    for chunk in ids.split(sizes, dim=1):
        end = begin + chunk.shape[1]
        own: dict[str, Any] = {}
        if "attention_mask" in more:
            own["attention_mask"] = more["attention_mask"][:, :end]
            own["position_ids"] = more["position_ids"][:, begin:end]
        parts.append(model(chunk, past_key_values=cache, **own).logits)
        begin = end
    return torch.cat(parts, dim=1)


def held(cache: SegmentCache, row: int = 0) -> list[Tensor]:
    """Keys and values of a row as attention reads them, of each layer and group of heads."""
    found = []
    for layer in cache.segment_layers:
        for group in layer.groups:
            lane, rope = group.lane(row, group.plan.heads), layer._rope_table()
            found += [torch.cat([decode(run, rope) for run in runs], dim=1) for runs in (lane.keys, lane.values)]
    return found


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def divergence(exact: Tensor, found: Tensor) -> float:
    """Mean KL divergence in nats of next-token predictions from logits."""
    log_p = exact.log_softmax(-1)
    return float((log_p.exp() * (log_p - found.log_softmax(-1))).sum(-1).mean())


def keys_and_values() -> tuple[Tensor, Tensor]:
    """Those of the first layer of the random Llama, keys after rotary embedding, [3, 2, PROMPT, 32]."""
    model = tiny()
    cache = new_cache(model, "exact", {})
    feed(model, cache, tokens(3, PROMPT, seed=5), [PROMPT])
    group = cache.segment_layers[0].groups[0]
    keys, values = (torch.stack([side.window(row) for row in range(3)]) for side in group.sides)
    return keys, values


def store(
    cache: SegmentCache, keys: Tensor, values: Tensor, sizes: Sequence[int], padding: Sequence[int] | None = None
) -> None:
    """Give the first layer keys and values in chunks; `padding`: for each row, how many of the first are none."""
    layer, begin = cache.segment_layers[0], 0
    rows, length = keys.shape[0], keys.shape[2]
    columns = torch.arange(length)
    starts = torch.tensor(padding if padding is not None else [0] * rows)[:, None]
    for size in sizes:
        end = begin + size
        if begin == 0 and layer.plan[0].pivots:
            layer.note_inputs(values[:, 0, :size])
        k, _ = layer.update(keys[:, :, begin:end], values[:, :, begin:end])
        mask = None
        if padding is not None:
            mask = (columns[None, begin:end, None] >= columns[None, None, :end]) & (columns[:end] >= starts[:, None])
        positions = (columns[begin:end] - starts).clamp(min=0)
        layer.attend(k.repeat_interleave(2, 1), None if mask is None else mask[:, None], positions, 1.0, None, None)
        begin = end
    assert begin == length
