"""R-Sparse: what its sheet says must hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.errors import TargetError
from trimtab.evaluation import NextTokens, divergence
from trimtab.evaluation.kl import window_tokens
from trimtab.kernels.gather_matmul.reference import counts
from trimtab.layers import RSparse
from trimtab.layers._rsparse_search import Genes, evolve
from trimtab.layers.rsparse import ALL, order_statistic
from trimtab.models import tokenizer_of
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.random import random_model
from trimtab.models.views import ModelView
from trimtab.tensors.sparse_inputs import SparseInputs, column_norms, every_token_sparse


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def threshold_for(method: RSparse, weight: Tensor, inputs: Tensor, alpha: float) -> float:
    ascending = method.scores(weight, inputs).flatten().sort().values
    return order_statistic(ascending, 1 - method.share(alpha))


def error(method: RSparse, weight: Tensor, inputs: Tensor, alpha: float) -> float:
    """Relative squared error of the output, thresholds from these inputs."""
    part = method.part(weight, alpha, threshold_for(method, weight, inputs, alpha))
    exact = inputs @ weight.T
    return float((part.matmul(inputs) - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_a_threshold_below_all_inputs_is_the_dense_layer(rows: int) -> None:
    weight, x = drawn(24, 40), drawn(rows, 40, seed=1)
    part = RSparse().part(weight, 0.9, ALL)
    assert part.rank > 0
    assert torch.allclose(part.matmul(x), x @ weight.T, atol=1e-5)
    assert order_statistic(torch.arange(10.0), 0.05) == ALL


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_alpha_of_one_is_thresholding_alone(rows: int) -> None:
    weight, x = drawn(24, 40), drawn(rows, 40, seed=1)
    part = RSparse(criterion="magnitude").part(weight, 1.0, 0.6)
    assert part.rank == 0
    assert part.scale is None
    assert torch.allclose(part.matmul(x), torch.where(x.abs() > 0.6, x, 0) @ weight.T, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 3.0, 1e9])
@pytest.mark.parametrize("rows", [1, 12])
def test_factors_of_full_rank_are_the_dense_layer_at_any_threshold(rows: int, threshold: float) -> None:
    weight, x = drawn(24, 40), drawn(rows, 40, seed=1)
    part = SparseInputs.of(weight, threshold, 3, rank=24)
    assert torch.allclose(part.matmul(x), x @ weight.T, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.3, 0.95, 1.0])
def test_few_rows_and_many_are_one_function(alpha: float) -> None:
    """The kernel that gathers columns and the masked product agree, with the weighted criterion."""
    weight, x = drawn(33, 70), drawn(48, 70, seed=1)
    method = RSparse()
    part = method.part(weight, alpha, threshold_for(method, weight, x, alpha))
    many = part.matmul(x)
    few = torch.cat([part.matmul(rows) for rows in x.split(5)])
    assert torch.allclose(few, many, atol=1e-5, rtol=1e-5)
    mask = (x.abs() * weight.norm(dim=0)) > part.limit
    expected = torch.where(mask, x, 0) @ weight.T
    if part.left is not None and part.right is not None:
        expected = expected + torch.where(mask, 0, x) @ (part.left @ part.right).T
    assert torch.allclose(many, expected, atol=1e-4)


def test_norms_of_columns_are_those_of_the_svd() -> None:
    weight = drawn(24, 40)
    _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    assert torch.allclose(column_norms(weight).double(), (right.T * values).norm(dim=1), rtol=1e-6)


def test_budget_counts_both_factors_with_the_real_widths() -> None:
    method = RSparse(sparsity=0.5)
    assert method.budget(2048, 2048, 1.0) == (1024, 0)
    # k and v of grouped heads: (2048 * 512 * 0.5 - 972 * 512) / 2560 = 10.4, not that of a square matrix
    assert method.budget(512, 2048, 0.95) == (972, 10)
    assert method.budget(4096, 11008, 0.8) == (4403, 298)
    assert method.budget(40, 24, 0.02) == (1, 6)
    for alpha in (0.02, 0.4, 0.77, 0.95):
        kept, rank = method.budget(700, 300, alpha)
        assert kept * 700 + rank * 1000 <= 0.5 * 700 * 300 < (kept + 1) * 700 + (rank + 1) * 1000


def test_thresholds_are_order_statistics() -> None:
    values = torch.arange(1.0, 101.0)
    assert order_statistic(values, 0.5) == 50
    assert float((values > order_statistic(values, 0.525)).float().mean()) == pytest.approx(0.48)


def test_weighing_by_norms_loses_less_than_magnitude_alone() -> None:
    """The sheet's synthetic case, with columns of different norms, at equal kept inputs."""
    weight = drawn(256, 256) * torch.rand(256, generator=torch.Generator().manual_seed(2)) * 2
    x = drawn(512, 256, seed=1)
    weighted, plain = (error(RSparse(criterion=c), weight, x, 1.0) for c in ("weighted", "magnitude"))
    assert weighted < plain
    even = drawn(256, 256)
    weighted, plain = (error(RSparse(criterion=c), even, x, 1.0) for c in ("weighted", "magnitude"))
    assert weighted < plain < 1.05 * weighted


def test_columns_are_best_without_structure_and_the_low_rank_copy_where_the_spectrum_falls_fast() -> None:
    x = drawn(512, 256, seed=1)
    alphas = (1.0, 0.9, 0.7, 0.4)
    flat = [error(RSparse(), drawn(256, 256), x, alpha) for alpha in alphas]
    assert flat == sorted(flat)
    assert flat[-1] > 2 * flat[0]
    left, right = (torch.linalg.qr(drawn(256, 256, seed=s)).Q for s in (3, 4))
    falling = (left * torch.exp(-torch.arange(256) / 8)) @ right
    curve = [error(RSparse(), falling, x, alpha) for alpha in alphas]
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < 0.01 * curve[0]


def prose(model: Any, windows: int, length: int, seed: int) -> Tensor:
    return window_tokens(model, tokenizer_of(model), None, windows, length, seed)


@pytest.fixture(scope="module")
def ref_mini() -> tuple[Any, RSparse]:
    """`ref-mini`, converted on the shipped calibration prose."""
    model, method = tt.load("ref-mini", dtype=torch.float32), RSparse(sparsity=0.5, alpha=0.9)
    calibration = CalibrationSet.from_text(None, tokenizer_of(model), sequences=32, length=128)
    return tt.compress(model, method, calibration=calibration, progress=False), method


def test_the_share_of_inputs_on_other_text_is_the_one_asked_for(ref_mini: tuple[Any, RSparse]) -> None:
    """Each linear, within two points, on prose that no threshold has seen."""
    model, method = ref_mini
    found: dict[str, list[float]] = {}

    def watch(name: str) -> Any:
        def look(module: CompressedLinear, arguments: tuple[Tensor]) -> None:
            part = module.tensor.parts[0]
            assert isinstance(part, SparseInputs)
            large = counts(arguments[0], part.limit, part.scale)
            found.setdefault(name, []).append(float(large.float().mean()))

        return look

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear)
    ]
    with torch.no_grad():
        model(prose(model, 16, 128, seed=1))
    for handle in handles:
        handle.remove()
    assert len(found) == len(ModelView.of(model).linears)
    assert {name: shares[0] for name, shares in found.items()} == {
        name: pytest.approx(0.45, abs=0.02) for name in found
    }
    for entry in model.trimtab.record.changed:
        assert entry["kept_share"] == pytest.approx(0.45, abs=0.003)
        out_features, in_features = entry["shape"]
        assert (entry["kept_inputs"], entry["rank"]) == method.budget(out_features, in_features, 0.9)


def test_prompts_are_dense_only_where_asked_and_never_in_an_evaluation(ref_mini: tuple[Any, RSparse]) -> None:
    sparse, method = ref_mini
    dense = tt.load("ref-mini", dtype=torch.float32)
    calibration = CalibrationSet.from_text(None, tokenizer_of(dense), sequences=32, length=128)
    asked = dataclasses.replace(method, prefill="dense")
    model = tt.compress(tt.load("ref-mini", dtype=torch.float32), asked, calibration=calibration, progress=False)
    tokens = prose(dense, 2, 64, seed=2)

    def logits(one: Any, of: Tensor = tokens) -> Tensor:
        with torch.no_grad():
            found = one(of).logits
        assert isinstance(found, Tensor)
        return found

    assert torch.allclose(logits(model), logits(dense), atol=1e-4)
    assert not torch.allclose(logits(sparse), logits(dense), atol=1e-1)
    with every_token_sparse():
        assert torch.equal(logits(model), logits(sparse))
    assert torch.allclose(logits(model), logits(dense), atol=1e-4)
    # eight rows are few: decoded, not read
    assert torch.equal(logits(model, tokens[:1, :8]), logits(sparse, tokens[:1, :8]))
    expected = NextTokens.of(dense, windows=2, length=64)
    moved = [divergence(one, expected).estimates()["kl_nats_per_token"].value for one in (model, sparse)]
    assert moved[0] == moved[1] > 0.01
    asked_of_both = [tt.evaluate(one, "prose", limit=2)["prose"].metrics for one in (model, sparse)]
    assert asked_of_both[0] == asked_of_both[1]


def test_thresholds_in_sequential_mode_see_what_sparse_layers_make(calibration: CalibrationSet) -> None:
    def thresholds(mode: Any) -> list[float]:
        model = random_model("llama")
        tt.compress(model, RSparse(), calibration=calibration, mode=mode, progress=False)
        return [entry["threshold"] for entry in model.trimtab.record.changed]

    sequential, dense = thresholds("sequential"), thresholds("dense")
    assert sequential[:3] == dense[:3]  # q, k and v of the first block
    assert all(a != b for a, b in zip(sequential[3:], dense[3:], strict=True))


def test_a_narrow_input_is_refused_by_name() -> None:
    linear = ModelView.of(random_model("llama")).linears[0]
    with pytest.raises(TargetError, match=r"q_proj has 48 inputs, of which sparsity=0\.99 keeps none"):
        RSparse(sparsity=0.99).check_linear(linear)
    linear.parent.q_proj = nn.Linear(48, 48, dtype=torch.float64)
    double = dataclasses.replace(linear, module=linear.parent.q_proj)
    with pytest.raises(TargetError, match=r"q_proj holds torch\.float64, in which no factors are stored"):
        RSparse().check_linear(double)
    RSparse(factor_dtype="float32").check_linear(double)


def test_evolution_finds_a_valley_and_never_loses_what_it_had() -> None:
    goal, seen = (20, 100, 60, 95), []

    def loss(genes: Genes) -> float:
        seen.append(genes)
        return float(sum((a - b) ** 2 for a, b in zip(genes, goal, strict=True)))

    options = {"population": 16, "generations": 12, "survivors": 4, "seed": 3}
    best = evolve(4, loss, **options)
    assert seen[:2] == [(100,) * 4, (95,) * 4]
    assert len(seen) == 16 + 12 * 12
    assert all(2 <= gene <= 100 for genes in seen for gene in genes)
    born = [{genes[place] for genes in seen[:16]} for place in range(4)]
    assert any(gene not in born[place] for genes in seen[16:] for place, gene in enumerate(genes))  # by mutation
    assert loss(best) == min(map(loss, set(seen)))
    assert loss(best) < 0.05 * min(loss((100,) * 4), loss((95,) * 4))
    assert evolve(4, loss, **options) == best
    assert evolve(4, lambda genes: 0.0, **options) == (100,) * 4


SEARCHED = RSparse(alpha="searched", population=6, generations=2, survivors=2, search_sequences=4)


def test_what_is_searched_is_no_worse_than_uniform_ratios_on_its_text(calibration: CalibrationSet) -> None:
    model = random_model("llama")
    tt.compress(model, SEARCHED, calibration=calibration, mode="dense", progress=False)
    record = model.trimtab.record
    found = record.metrics["search"]
    assert found["nats_per_token"] <= min(found["nats_per_token_at_100_percent"], found["nats_per_token_at_95_percent"])
    assert {entry["alpha"] for entry in record.changed} != {1.0}
    # the loss that was searched is that of the model that came out
    for alpha, name in ((None, "nats_per_token"), (0.95, "nats_per_token_at_95_percent")):
        if alpha is not None:
            model = random_model("llama")
            method = RSparse(alpha=alpha)
            tt.compress(model, method, calibration=calibration, mode="dense", progress=False)
        tokens = calibration.tokens[:4]
        with torch.no_grad():
            logits = model(tokens).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert float(loss) == pytest.approx(found[name], rel=1e-4)


def test_a_search_asks_for_no_loss_twice(calibration: CalibrationSet, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"calibration": calibration, "progress": False, "state_dir": tmp_path / "state"}
    whole = tt.compress(random_model("llama"), SEARCHED, **settings)
    file = tmp_path / "state" / "search.json"
    known = json.loads(file.read_text())
    assert len(known) == whole.trimtab.record.metrics["search"]["evaluated"]
    assert len(known) > 6
    poisoned = {key: (-1.0 if key.startswith("100,100") and set(key.split(",")) == {"100"} else value)
                for key, value in known.items()}  # fmt: skip
    file.write_text(json.dumps(poisoned))
    again = tt.compress(random_model("llama"), SEARCHED, **settings)
    assert {entry["alpha"] for entry in again.trimtab.record.changed} == {1.0}


def test_a_model_in_training_mode_stays_in_it(calibration: CalibrationSet) -> None:
    model = random_model("llama")
    model.train()
    tt.compress(model, SEARCHED, calibration=calibration, progress=False)
    assert model.training
    assert all(module.training for module in model.modules())
