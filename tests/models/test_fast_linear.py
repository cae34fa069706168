"""Fast linears: the same model in every respect but speed, and undone without a trace."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.kernels import library
from trimtab.kernels.half_linear import MAX_ROWS, native
from trimtab.models.fast_linear import use_fast_linear
from trimtab.models.random import random_model

pytestmark = pytest.mark.skipif(
    library.absent() is not None or library.machine_isas() == ("scalar",), reason="no native kernel is used here"
)


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRIMTAB_KERNELS", "TRIMTAB_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every product that the kernel has computed."""
    rows: list[int] = []
    run = native.half_linear_native

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append(x.shape.numel() // x.shape[-1])
        return run(x, weight, bias)

    monkeypatch.setattr(native, "half_linear_native", counted)
    return rows


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(48, 24).bfloat16()


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


@torch.no_grad()
def test_few_rows_are_fast_and_others_are_exactly_as_before(layer: nn.Linear, calls: list[int]) -> None:
    x, x1 = x_of(2, 5, 48), x_of(1, 1, 48)
    before, before1 = layer(x), layer(x1)
    with use_fast_linear(layer) as fast:
        assert fast.names == ("",)
        assert torch.equal(layer(x), before)  # 10 rows
        assert not calls
        assert layer(x1).shape == (1, 1, 24)
        torch.testing.assert_close(layer(x1), before1)
        torch.testing.assert_close(layer(input=x[:, :4]), before[:, :4])
        assert calls == [1, 1, MAX_ROWS]
    assert "forward" not in layer.__dict__
    assert torch.equal(layer(x1), before1)
    assert len(calls) == 3


def test_where_it_could_show_the_original_runs(layer: nn.Linear, calls: list[int]) -> None:
    x = x_of(1, 48)
    with use_fast_linear(layer):
        layer(x).float().sum().backward()
        assert layer.weight.grad is not None
        layer.requires_grad_(False)
        layer(x.clone().requires_grad_()).float().sum().backward()
        assert not calls
        layer(x)
        assert calls == [1]
        with torch.autocast("cpu", dtype=torch.float16):
            assert layer(x).dtype == torch.float16
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            layer(x_of(1, 47))
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.float())
        layer.float()
        assert layer(x.float()).dtype == torch.float32
        layer.to("meta")
        assert layer(x.float().to("meta")).is_meta
        assert calls == [1]


@torch.no_grad()
def test_compiled_and_traced_graphs_hold_the_product(layer: nn.Linear) -> None:
    x, other = x_of(1, 48), x_of(1, 48) + 1
    expected = layer(other)
    with use_fast_linear(layer):
        graph = torch.export.export(nn.Sequential(layer), (x,), strict=False)
        assert torch.equal(graph.module()(other), expected)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(other), expected)


@torch.no_grad()
def test_a_model_is_the_same_in_every_other_respect(tmp_path: Path, calls: list[int]) -> None:
    model = random_model("llama").bfloat16().requires_grad_(False)
    tokens = torch.tensor([[5, 9, 17]])
    plain, types = model(tokens).logits, [type(module) for module in model.modules()]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    state, text = copy.deepcopy(model.state_dict()), repr(model)
    with use_fast_linear(model) as fast:
        assert sorted(fast.names) == sorted(names)
        assert not fast.unchanged
        assert [type(module) for module in model.modules()] == types
        assert repr(model) == text
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        torch.testing.assert_close(model(tokens).logits, plain, atol=0.05, rtol=0.05)
        assert len(calls) == len(names)
        model.save_pretrained(tmp_path)
        reloaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert torch.equal(reloaded(tokens).logits, plain)
        seen: list[Any] = []
        hook = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out))
        model(tokens)
        hook.remove()
        assert len(seen) == 1
    assert torch.equal(model(tokens).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_plain_and_independent(layer: nn.Linear, calls: list[int], way: str) -> None:
    x = x_of(1, 48)
    before = layer(x)
    with use_fast_linear(nn.Sequential(layer)):
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        else:
            other = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
        layer.weight.zero_()
        assert torch.equal(other(x), before)
        assert not calls
        with use_fast_linear(other) as fast:  # a copy can be made fast, and copied, again
            assert fast.names == ("",)
            copy.deepcopy(other)(x)
            assert not calls
            other(x)
            assert calls == [1]
        assert torch.equal(other(x), before)


@torch.no_grad()
def test_twice_is_once(layer: nn.Linear, calls: list[int]) -> None:
    x = x_of(1, 48)
    outer = use_fast_linear(layer)
    with use_fast_linear(layer) as inner:
        assert inner.names == ()
        assert inner.unchanged == {"": "it is fast already"}
    layer(x)
    assert calls == [1]
    outer.remove()
    outer.remove()
    layer(x)
    assert calls == [1]


@torch.no_grad()
def test_what_others_replace_stays(layer: nn.Linear) -> None:
    theirs = lambda x: x  # noqa: E731
    fast = use_fast_linear(layer)
    layer.forward = theirs  # type: ignore[method-assign]
    fast.remove()
    assert layer.forward is theirs
    assert "something else" in use_fast_linear(layer).unchanged[""]


class Own(nn.Linear):
    pass


def test_what_is_not_changed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"own": Own(4, 4).bfloat16(), "wide": nn.Linear(4, 4), "act": nn.ReLU()})
    model["meta"] = nn.Linear(4, 4, device="meta")
    fast = use_fast_linear(model)
    assert fast.names == ()
    assert set(fast.unchanged) == {"own", "wide", "meta"}
    assert "Own" in fast.unchanged["own"]
    assert "torch.float32 on cpu" in fast.unchanged["wide"]
    gpt2 = use_fast_linear(random_model("gpt2").bfloat16())
    assert gpt2.names == ("lm_head",)
    assert all("[in, out]" in reason for reason in gpt2.unchanged.values())
    monkeypatch.setenv("TRIMTAB_KERNELS", "reference")
    assert use_fast_linear(nn.Linear(4, 4).bfloat16()).unchanged == {"": "TRIMTAB_KERNELS=reference"}


def test_a_fast_model_is_freed_at_once() -> None:
    """Without waiting for the cycle collector: a model holds gigabytes."""
    gc.disable()
    try:
        layer = nn.Linear(4, 4).bfloat16()
        alive = weakref.ref(layer)
        use_fast_linear(layer)
        del layer
        assert alive() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_every_family_decodes_alike(model: PreTrainedModel) -> None:
    model = model.bfloat16().eval()
    tokens = torch.tensor([[5, 9, 17, 4]])
    plain = model(tokens).logits
    with use_fast_linear(model):
        torch.testing.assert_close(model(tokens).logits, plain, atol=0.1, rtol=0.1)
    assert torch.equal(model(tokens).logits, plain)
