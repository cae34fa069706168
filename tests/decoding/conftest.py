"""Random models, drafts that agree with them sometimes, and loops whose readers can be looked into."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.decoding import Sampling
from trimtab.decoding._decoder import exact_cache
from trimtab.decoding._distribution import Distribution, Warp
from trimtab.decoding._loop import Loop
from trimtab.decoding._reader import ModelReader
from trimtab.decoding.base import DecodingMethod, DraftSetting
from trimtab.models.segments import SegmentCache

NEW = 24


def near(model: PreTrainedModel, noise: float = 0.15) -> PreTrainedModel:
    """A copy with noise on its weights: a draft that is right some of the time."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in draft.parameters():
            spread = float(parameter.std()) if parameter.ndim > 1 else 0.0
            parameter.add_(noise * spread * torch.randn(parameter.shape, generator=generator))
    return draft


def prompts(*lengths: int, vocabulary: int = 131, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def plainly(model: PreTrainedModel, prompt: Sequence[int], count: int = NEW, **more: Any) -> list[int]:
    """What transformers writes greedily, without stop tokens."""
    ids = torch.tensor([list(prompt)])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **more}
    return model.generate(ids, **options)[0, len(prompt) :].tolist()  # type: ignore[no-any-return, operator]


def loop_of(
    method: DecodingMethod,
    model: PreTrainedModel,
    draft: PreTrainedModel,
    rows: int,
    sampling: Sampling,
    new_cache: Callable[[PreTrainedModel], SegmentCache] = exact_cache,
) -> tuple[Loop, list[ModelReader]]:
    """A loop and its readers: the target's and, once there has been a draft, the draft's."""
    readers = [ModelReader(model, rows, new_cache)]

    def new_reader(count: int) -> ModelReader:
        readers.append(ModelReader(draft, count, exact_cache))
        return readers[-1]

    setting = DraftSetting(
        sampling, lambda name: new_reader, lambda temperature: Distribution([Warp(sampling.at(temperature))])
    )
    drafting = method.drafting(setting)
    assert drafting is not None
    return Loop(readers[0], Distribution([Warp(sampling)]), drafting.proposer, drafting.rule), readers
