"""Vector quantization: k-means that descends, codebooks that add, rounds that never raise the error of the output."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError, TargetError
from trimtab.models.statistics import Stats
from trimtab.models.views import LinearView
from trimtab.tensors.codebook import Codebook
from trimtab.tensors.kv.codebook import fit_codebook, nearest_centroid
from trimtab.tensors.metric import Metric
from trimtab.weights import _codebook_fit
from trimtab.weights._codebook_fit import DAMPING, fit_layer, initial_codebook
from trimtab.weights.gptq import Gptq
from trimtab.weights.vq import Vq

Make = Callable[[Tensor], LinearView]


def fitted(linear: LinearView, stats: Stats | None, **options: Any) -> tuple[Codebook, dict[str, Any]]:
    tensor, notes = Vq(**{"iterations": 10, "steps": 20, **options}).compress(linear, stats)
    (part,) = tensor.parts
    assert isinstance(part, Codebook)
    return part, dict(notes)


def start(weight: Tensor, diagonal: Tensor | None, **options: Any) -> Codebook:
    settings: dict[str, Any] = {"count": 1, "bits": 6, "width": 4, "iterations": 10, "name": "w", **options}
    return initial_codebook(weight, diagonal, **settings)[0]


def test_more_iterations_of_k_means_never_leave_more_error() -> None:
    points = torch.randn(1, 2000, 4, generator=torch.Generator().manual_seed(0))
    errors = []
    for iterations in range(1, 12):
        table = fit_codebook(points, 5, iterations=iterations).float()
        errors.append(float((points - table[:, nearest_centroid(points, table)[0]]).square().sum()))
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_a_second_codebook_for_what_the_first_leaves_lowers_the_error(correlated: tuple[Tensor, Stats]) -> None:
    weight, _ = correlated
    errors = []
    for count in (1, 2, 3):
        part, reported = initial_codebook(weight, None, count=count, bits=6, width=4, iterations=10, name="w")
        errors.append(Metric.identity().relative_error(weight, part.dequantize()))
        assert reported == pytest.approx(errors[-1])
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_nearest_codes_of_the_result_are_its_codes(correlated: tuple[Tensor, Stats], linear_of: Make) -> None:
    weight, stats = correlated
    for given in (None, stats):
        part, _ = fitted(linear_of(weight), given, bits=2, data_free=given is None)
        assert torch.equal(part.project(part.dequantize()).codes, part.codes)


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 3}, {"bits": 4}, {"bits": 2, "in_group_size": 8}], ids=str)
def test_fitting_to_the_output_lowers_its_error_below_that_of_k_means(
    correlated: tuple[Tensor, Stats], linear_of: Make, options: dict[str, Any]
) -> None:
    weight, stats = correlated
    metric = Metric.gram(stats.gram)  # type: ignore[arg-type]
    free, _ = fitted(linear_of(weight), None, data_free=True, **options)
    part, notes = fitted(linear_of(weight), stats, **options)
    errors = [metric.relative_error(weight, p.dequantize()) for p in (free, part)]
    assert errors[1] < 0.7 * errors[0]
    assert part.nbytes == free.nbytes
    assert notes["rounds"] >= 1


def test_rounds_never_raise_the_objective_and_stop_by_the_tolerance(correlated: tuple[Tensor, Stats]) -> None:
    weight, stats = correlated
    assert stats.gram is not None
    damped = Metric.gram(stats.gram + DAMPING * stats.gram.diagonal().mean() * torch.eye(128))
    metric = Metric.gram(stats.gram)
    part = start(weight, stats.gram.diagonal())
    errors = [damped.squared_norm(part.dequantize() - weight)]
    for _ in range(3):
        part, rounds = fit_layer(part, weight, metric, steps=10, lr=2e-3, tolerance=0.999, beam=1)
        assert rounds == 1
        errors.append(damped.squared_norm(part.dequantize() - weight))
    assert errors == sorted(errors, reverse=True)
    _, rounds = fit_layer(part, weight, metric, steps=10, lr=2e-3, tolerance=0.01, beam=1)
    assert rounds > 1


def test_a_round_that_is_worse_is_not_kept(correlated: tuple[Tensor, Stats], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats = correlated
    part = start(weight, None)
    monkeypatch.setattr(_codebook_fit, "_tuned", lambda part, *_: part.with_continuous(
        {name: 3 * value for name, value in part.continuous().items()}
    ))  # fmt: skip
    found, rounds = fit_layer(part, weight, Metric.gram(stats.gram), steps=1, lr=1e-3, tolerance=0.01, beam=1)  # type: ignore[arg-type]
    assert found is part
    assert rounds == 1


def test_at_two_bits_it_beats_gptq_at_fewer_bytes(linear_of: Make) -> None:
    """A weight large enough that a codebook weighs little."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 128, generator=generator)
    x = torch.randn(2000, 128, generator=generator) @ torch.randn(128, 128, generator=generator) * 0.3
    stats = Stats("s", 2000, gram=x.T @ x / 2000)
    part, _ = fitted(linear_of(weight), stats, bits=2)
    (grid,) = Gptq(bits=2, group_size=16).compress(linear_of(weight), stats)[0].parts
    assert part.nbytes < grid.nbytes
    metric = Metric.gram(stats.gram)  # type: ignore[arg-type]
    assert metric.relative_error(weight, part.dequantize()) < metric.relative_error(weight, grid.dequantize())


@pytest.mark.parametrize(
    ("shape", "options", "bits"),
    [
        ((256, 256), {"bits": 2}, 8),
        ((128, 256), {"bits": 2}, 8),
        ((48, 48), {"bits": 2}, 5),
        ((24, 48), {"bits": 3}, 2),
        ((2048, 2048), {"bits": 2, "in_group_size": 8}, 8),
    ],
)
def test_codebooks_never_outgrow_half_the_codes(shape: tuple[int, int], options: dict[str, Any], bits: int) -> None:
    method = Vq(**options)
    assert method.code_bits(shape) == bits
    codes = shape[0] * shape[1] // method.group_size
    assert (1 << bits) * method.group_size * 2 <= codes / 2


def test_bits_per_weight_are_as_documented(linear_of: Make) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    part, notes = fitted(linear_of(weight), None, bits=2, data_free=True, iterations=2)
    assert 8 * part.nbytes / weight.numel() == 2 + 16 * 256 * 4 / 65536 + 16 / 256
    assert (notes["codebooks"], notes["code_bits"]) == (1, 8)


def test_degenerate_weights_and_inputs(linear_of: Make) -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    gram = torch.eye(32)
    gram[:, 8:16] = gram[8:16] = 0
    part, _ = fitted(linear_of(weight), Stats("s", 9, gram=gram))
    assert bool((part.dequantize()[3] == 0).all())
    assert Metric.gram(gram).relative_error(weight, part.dequantize()) < 0.2
    part, _ = fitted(linear_of(weight), Stats("s", 9, gram=torch.zeros(32, 32)))
    assert bool(torch.isfinite(part.dequantize()).all())
    part, _ = fitted(linear_of(torch.zeros(16, 32)), Stats("s", 9, gram=gram))
    assert bool((part.dequantize() == 0).all())
    with pytest.raises(NumericsError, match=r"block\.up: a row of norm .* has no float16 scale"):
        fitted(linear_of(1e5 * weight), None, data_free=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2, "in_group_size": 3}, r"8 divides bits x in_group_size = 6"),
        ({"in_group_size": -4}, "in_group_size=-4 must be 0"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"lr": 0.0}, "lr=0.0 and tolerance=0.01 must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Vq(**options)


def test_a_vector_that_does_not_divide_the_width_is_refused_by_name(linear_of: Make) -> None:
    with pytest.raises(TargetError, match=r"block\.up \(role up\): in_group_size=4 does not divide its width, 30"):
        Vq(bits=2).check_linear(linear_of(torch.zeros(4, 30)))
