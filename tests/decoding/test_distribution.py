"""The decoded distribution: transformers' warpers, in transformers' order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.decoding._distribution import Distribution, Warp
from trimtab.decoding._reader import Rows
from trimtab.decoding._sampling import Sampling

PREFIXES = [[3, 5, 5], [3, 5, 5, 7]]


def logits(seed: int = 0) -> Tensor:
    return 3 * torch.randn((2, 50), generator=torch.Generator().manual_seed(seed))


def decoded(sampling: Sampling, values: Tensor) -> Tensor:
    return Distribution([Warp(sampling)])(Rows(values), PREFIXES.__getitem__)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8},
    ],
)
def test_the_warpers_are_those_of_transformers(options: dict[str, float]) -> None:
    sampling = Sampling(**{"temperature": 1.0, **options})  # type: ignore[arg-type]
    wanted = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        wanted.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    wanted.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        wanted.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        wanted.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        wanted.append(MinPLogitsWarper(sampling.min_p))
    values = logits()
    for row, found in enumerate(decoded(sampling, values)):
        scores = wanted(torch.tensor([PREFIXES[row]]), values[row : row + 1].clone())  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.softmax(scores, dim=-1)[0])


def test_temperature_zero_takes_the_lowest_of_the_likeliest() -> None:
    values = logits()
    values[0, [4, 9, 40]] = 20.0
    found = decoded(Sampling(), values)
    assert found[0].nonzero().flatten().tolist() == [4]
    assert float(found[0, 4]) == 1.0
    assert int(found[1].argmax()) == int(values[1].argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_reported(temperature: float) -> None:
    values = logits()
    values[1, 3] = torch.nan
    with pytest.raises(NumericsError, match="after token 1 of a draft hold NaN"):
        decoded(Sampling(temperature=temperature), values)


def test_a_row_without_possible_tokens_is_reported() -> None:
    values = logits()
    values[0] = -torch.inf
    with pytest.raises(NumericsError, match="no possible token"):
        decoded(Sampling(temperature=1.0), values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}; it must be"):
        Sampling(**{name: value})  # type: ignore[arg-type]
