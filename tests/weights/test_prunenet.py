"""PruneNet on models: what it draws and keeps, policies in files, runs that are killed, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.core.errors import CheckpointError, ConfigError, TargetError
from trimtab.models.random import random_model
from trimtab.models.views import ModelView
from trimtab.weights import Neurons, PruneNet
from trimtab.weights import prunenet as module
from trimtab.weights._pruning.plan import Plan
from trimtab.weights._pruning.policy import Policy, first_matrix, ks_distance, singular_values


def sliced(family: str = "llama", *, seed: int = 0, state_dir: Path | None = None, **options: Any) -> PreTrainedModel:
    method = PruneNet(**{"episodes": 2, **options})
    return tt.compress(random_model(family), method, seed=seed, state_dir=state_dir, progress=False)


def kept(model: PreTrainedModel) -> list[Tensor]:
    return [entry.keep for entry in Plan.of_model(model).entries]


def gates(family: str = "llama") -> list[Tensor]:
    return [first_matrix(block.mlp.linears) for block in ModelView.of(random_model(family)).blocks]


def test_a_seed_decides_what_is_drawn_and_top_k_draws_nothing(tmp_path: Path) -> None:
    policy = str(tmp_path / "policy.safetensors")
    first = kept(sliced(policy=policy))
    assert all(torch.equal(a, b) for a, b in zip(first, kept(sliced(policy=policy)), strict=True))
    other = kept(sliced(policy=policy, seed=1))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    certain = kept(sliced(policy=policy, action="top_k"))
    assert all(
        torch.equal(a, b) for a, b in zip(certain, kept(sliced(policy=policy, action="top_k", seed=1)), strict=True)
    )
    stored = Policy.load(policy)
    for keep, gate in zip(certain, gates(), strict=True):
        scores = stored(gate).detach()
        assert float(scores[keep].min()) >= float(scores[~keep].max())


def test_the_state_is_the_gate_also_where_it_is_fused_and_up_where_there_is_none() -> None:
    fused = ModelView.of(random_model("phi3")).blocks[0].mlp.linears
    assert torch.equal(first_matrix(fused), fused[0].weight[:112])
    assert torch.equal(first_matrix(fused[:1]), fused[0].weight[:112])
    for family in ("gpt2", "opt", "gpt_neox"):
        linears = ModelView.of(random_model(family)).blocks[0].mlp.linears
        assert torch.equal(first_matrix(linears), linears[0].weight)
        assert first_matrix(linears).shape[0] == 112
    gated = ModelView.of(random_model("llama")).blocks[0].mlp.linears
    assert torch.equal(first_matrix(gated), gated[0].weight)
    assert gated[0].role == "gate"


def test_the_record_holds_what_training_kept_small() -> None:
    model = sliced(sparsity=0.3, action="top_k")
    metrics = model.trimtab.record.metrics
    pairs = [(gate, gate[keep]) for gate, keep in zip(gates(), kept(model), strict=True)]
    own = [ks_distance(singular_values(gate), singular_values(rest)) for gate, rest in pairs]
    assert metrics["mean_ks"]["kept"] == pytest.approx(sum(own) / 2)
    largest = [gate[gate.norm(dim=1).topk(78).indices] for gate in gates()]
    own = [ks_distance(singular_values(a), singular_values(b)) for a, b in zip(gates(), largest, strict=True)]
    assert metrics["mean_ks"]["largest_rows"] == pytest.approx(sum(own) / 2)
    assert len(metrics["mean_ks_of_episodes"]) == 2


def test_a_policy_is_trained_once_and_used_at_other_sparsities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policies" / "policy.safetensors"
    first = sliced(policy=str(path), sparsity=0.4)
    before = path.read_bytes()
    monkeypatch.setattr(module, "train", None)  # nobody trains again
    again = sliced(policy=str(path), sparsity=0.4)
    assert all(torch.equal(a, b) for a, b in zip(kept(first), kept(again), strict=True))
    small = sliced(policy=str(path), sparsity=0.1)
    assert [int(keep.sum()) for keep in kept(small)] == [100, 100]
    assert path.read_bytes() == before


def test_a_run_killed_after_training_does_not_train_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sliced(state_dir=tmp_path / "state")
    assert (tmp_path / "state" / "policy.safetensors").exists()
    for block in (tmp_path / "state").glob("block-*"):
        block.rename(tmp_path / block.name)
    monkeypatch.setattr(module, "train", None)
    model = sliced(state_dir=tmp_path / "state")
    assert model.trimtab.record.metrics["resumed_blocks"] == 0
    assert all(torch.equal(a, b) for a, b in zip(kept(whole), kept(model), strict=True))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in whole.state_dict().items())
    assert model.trimtab.record.metrics["mean_ks_of_episodes"] == whole.trimtab.record.metrics["mean_ks_of_episodes"]


def test_policies_of_other_models_and_files_that_are_none_are_refused_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    sliced("gpt_neox", policy=str(path))
    with pytest.raises(ConfigError, match=r"policy for matrices \[112, 64\], and this model's are \[112, 48\]"):
        sliced(policy=str(path))
    path.write_text("no policy")
    with pytest.raises(CheckpointError, match="cannot be read"):
        sliced(policy=str(path))


def test_blocks_of_two_widths_want_two_policies() -> None:
    model = random_model("llama")
    tt.compress(model, Neurons(sparsity=0.5, targets=("model.layers.1.mlp.*",)), progress=False)
    with pytest.raises(
        TargetError,
        match=r"model\.layers\.1\.mlp begins with a matrix \[56, 48\], and model\.layers\.0\.mlp with \[112",
    ):
        tt.compress(model, PruneNet(episodes=1), progress=False)
    method = PruneNet(episodes=1, sparsity=0.5, targets=("model.layers.0.mlp.*",))
    tt.compress(model, method, progress=False)
    assert {linear.in_features for linear in ModelView.of(model).linears if linear.role == "down"} == {56}


@pytest.mark.parametrize(
    ("option", "value"),
    [("episodes", 0), ("learning_rate", 0.0), ("discount", 1.5), ("discount", 0.0), ("prior", -1.0)],
)
def test_options_outside_their_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"option {option}="):
        PruneNet(**{option: value})  # type: ignore[arg-type]
