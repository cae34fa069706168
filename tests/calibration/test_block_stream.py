"""Blocks driven one by one compute what the model computes, for every family; statistics are those of the sites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibration.live_bytes import LiveBytes
from trimtab.core.errors import DataError, NumericsError
from trimtab.models.calibration import BlockStream, gather_dense
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.random import ALL_FAMILIES, random_model
from trimtab.models.views import ModelView

NEEDS = ("gram", "abs_max", "reservoir")


def calibration(sequences: int = 6, length: int = 20, padded: bool = True) -> CalibrationSet:
    tokens = torch.randint(3, 131, (sequences, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(sequences, length, dtype=torch.bool)
    if padded:
        mask[2, 15:] = False
        mask[5, 3:] = False
    return CalibrationSet.from_tokens(tokens, mask)


def inputs_seen(
    model: PreTrainedModel, data: CalibrationSet, chunk: int
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Input of each linear, and the logits, from the model's own forward on the same chunks."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for linear in ModelView.of(model).linears:

        def keep(module: Any, arguments: tuple[Tensor, ...], name: str = linear.name) -> None:
            seen.setdefault(name, []).append(arguments[0])

        hooks.append(linear.module.register_forward_pre_hook(keep))
    logits = []
    with torch.no_grad():
        for tokens, mask in zip(data.tokens.split(chunk), data.mask.split(chunk), strict=True):
            logits.append(model(input_ids=tokens, attention_mask=None if mask.all() else mask.long()).logits)
    for hook in hooks:
        hook.remove()
    return seen, logits


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_blocks_driven_one_by_one_give_the_models_logits(family: str) -> None:
    """Bit for bit, with padding and with more layers than one of each kind of mask (full, sliding)."""
    model = random_model(family, num_hidden_layers=4) if family != "gpt2" else random_model(family, n_layer=4)
    data = calibration()
    view = ModelView.of(model)
    _, expected = inputs_seen(model, data, chunk=2)
    stream = BlockStream(view, data, chunk_tokens=40)
    for block in view.blocks:
        stream.advance(block)
    final = view.blocks[-1].module
    for index, logits in enumerate(expected):
        hidden = stream.hidden(index)
        hook = final.register_forward_hook(lambda module, args, output, hidden=hidden: hidden)
        tokens, mask = data.tokens[2 * index : 2 * index + 2], data.mask[2 * index : 2 * index + 2]
        with torch.no_grad():
            found = model(input_ids=tokens, attention_mask=None if mask.all() else mask.long()).logits
        hook.remove()
        assert torch.equal(found, logits)
        assert float(logits.std()) > 0.01


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_statistics_are_those_of_each_site(family: str) -> None:
    model = random_model(family)
    data = calibration()
    view = ModelView.of(model)
    seen, _ = inputs_seen(model, data, chunk=2)
    needs = {linear.site: NEEDS for linear in view.linears}
    found = {site: stats for part in gather_dense(view, data, needs, chunk_tokens=40) for site, stats in part.items()}
    assert set(found) == {
        f"layers.{i}.{s}" for i in (0, 1) for s in ("attention_in", "attention_out", "mlp_in", "mlp_out")
    }
    for linear in view.linears:
        x = torch.cat([chunk.reshape(-1, linear.in_features) for chunk in seen[linear.name]])[data.mask.reshape(-1)]
        stats = found[linear.site]
        assert stats.count == data.count == len(x)
        assert torch.equal(stats.abs_max, x.abs().amax(0))
        exact = (x.double().T @ x.double() / len(x)).float()
        torch.testing.assert_close(stats.gram, exact, rtol=1e-4, atol=1e-5 * float(exact.diagonal().mean()))


def test_the_model_is_left_as_it_was() -> None:
    model = random_model("llama")
    model.train()
    view, data = ModelView.of(model), calibration()
    stream = BlockStream(view, data)
    stream.gather(view.blocks[0], {"layers.0.mlp_in": NEEDS})
    stream.advance(view.blocks[0])
    assert model.training
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = random_model("llama")
    view, data = ModelView.of(model), calibration()
    with torch.no_grad():
        view.blocks[0].linears[0].module.weight.fill_(torch.nan)
    with pytest.raises(NumericsError):
        BlockStream(view, data).advance(view.blocks[0])
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks


def test_statistics_after_a_changed_layer_see_the_change() -> None:
    """What sequential calibration rests on: a site's input comes from the block as it is now."""
    model = random_model("llama")
    view, data = ModelView.of(model), calibration()
    stream = BlockStream(view, data)
    before = stream.gather(view.blocks[0], {"layers.0.attention_in": ["gram"], "layers.0.attention_out": ["gram"]})
    value = next(linear for linear in view.blocks[0].linears if linear.role == "v")
    with torch.no_grad():
        value.module.weight.mul_(2)
    after = stream.gather(view.blocks[0], {"layers.0.attention_in": ["gram"], "layers.0.attention_out": ["gram"]})
    assert torch.equal(after["layers.0.attention_in"].gram, before["layers.0.attention_in"].gram)
    torch.testing.assert_close(after["layers.0.attention_out"].gram, 4 * before["layers.0.attention_out"].gram)


def test_a_site_is_enough_to_stop_at() -> None:
    """Gathering at the first site does not run the rest of the block."""
    model = random_model("llama")
    view, data = ModelView.of(model), calibration()
    ran = []
    view.blocks[0].linears[-1].module.register_forward_hook(lambda *_: ran.append("down"))
    BlockStream(view, data).gather(view.blocks[0], {"layers.0.attention_in": ["gram"]})
    assert not ran


def test_chunks_change_statistics_only_by_rounding() -> None:
    model = random_model("qwen3")
    view, data = ModelView.of(model), calibration(padded=False)
    needs = {linear.site: ["gram", "second_moment"] for linear in view.linears}
    one, many = (list(gather_dense(view, data, needs, chunk_tokens=tokens)) for tokens in (10_000, 1))
    for a, b in zip(one, many, strict=True):
        for site in a:
            torch.testing.assert_close(a[site].gram, b[site].gram, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("role", ["q", "o", "gate", "down"])
def test_non_finite_activations_are_refused_with_the_module(role: str) -> None:
    model = random_model("llama")
    view, data = ModelView.of(model), calibration()
    linear = next(linear for linear in view.blocks[1].linears if linear.role == role)

    def overflow(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0] * torch.inf,)

    linear.module.register_forward_pre_hook(overflow)
    stream = BlockStream(view, data)
    stream.advance(view.blocks[0])
    members = view.blocks[1].sites[linear.site]
    with pytest.raises(NumericsError, match=rf"the input of {members[0].name} \(site {linear.site}\)"):
        stream.gather(view.blocks[1], {linear.site: ["gram"]})


def test_non_finite_block_output_is_refused_with_the_block() -> None:
    model = random_model("llama")
    view, data = ModelView.of(model), calibration()
    with torch.no_grad():
        view.blocks[0].linears[-1].module.weight[3, 5] = torch.inf
    with pytest.raises(NumericsError, match=r"block model\.layers\.0 puts out"):
        BlockStream(view, data).advance(view.blocks[0])


def test_sequences_beyond_the_context_are_refused() -> None:
    with pytest.raises(DataError, match="200 tokens are longer than the model's context of 128"):
        BlockStream(ModelView.of(random_model("llama")), calibration(length=200))


@pytest.mark.parametrize("hoard", [False, True], ids=["as it is", "broken: keeps the statistics"])
def test_memory_of_a_dense_pass_does_not_grow_with_depth(hoard: bool) -> None:
    data = calibration(8, 32, padded=False)

    def peak(layers: int) -> int:
        model = random_model("llama", num_hidden_layers=layers, intermediate_size=256)
        view = ModelView.of(model)
        needs = {linear.site: ["gram"] for linear in view.linears}
        with LiveBytes([*model.parameters(), *model.buffers(), data.tokens, data.mask]) as live:
            kept = []
            for statistics in gather_dense(view, data, needs, chunk_tokens=64):
                kept = [*kept, statistics] if hoard else []
                del statistics
        return live.peak

    gram = 256 * 256 * 4  # of the largest site; keeping the statistics of one more block would show
    growth = peak(4) - peak(2)
    assert (growth > gram) if hoard else (growth < gram / 8)
    assert peak(2) > gram


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_captured_call_can_be_made_again(family: str) -> None:
    """Of attention, MLP and the block itself, behind the first block; and it follows a change of the weights."""
    model = random_model(family)
    view = ModelView.of(model)
    stream = BlockStream(view, calibration(), chunk_tokens=40)
    stream.advance(view.blocks[0])
    block = view.blocks[1]
    for module in (block.attention.module, block.mlp.module, block.module):
        calls = stream.capture(block, module, sequences=3)
        assert [len(call.output) for call in calls] == [2, 2]
        with torch.no_grad():
            for call in calls:
                torch.testing.assert_close(call.run(), call.output)
                assert not torch.allclose(call.run(2 * call.hidden), call.output, atol=1e-2)
    with torch.no_grad():
        block.linears[-1].set_weight(block.linears[-1].weight.flip(0))
        assert not torch.allclose(calls[0].run(), calls[0].output, atol=1e-2)
