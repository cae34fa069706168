"""Blocks that decode in two native calls step aside wherever anybody looks inside or wants something else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from trimtab.kernels import library
from trimtab.kernels.op import KERNELS_VARIABLE
from trimtab.models.attention import BACKEND
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.fast_decoding import fast_decoding
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.low_rank import LowRank
from trimtab.tensors.rotation import Rotation

from .decoding import BLOCKS, blocks, decode, make, native_steps, plain, prompt, same

pytestmark = pytest.mark.skipif(library.absent() is not None, reason="there are no native kernels here")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return native_steps(monkeypatch)


INSIDE = [
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn",
    "self_attn.q_proj",
    "self_attn.o_proj",
    "mlp",
    "mlp.act_fn",
    "mlp.gate_proj",
    "mlp.down_proj",
]


@pytest.mark.parametrize("name", INSIDE)
def test_hooks_inside_still_fire(name: str, calls: list[int]) -> None:
    model = make()
    expected = decode(model)
    calls.clear()
    module, seen = blocks(model)[1].get_submodule(name), []
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *_: seen.append(name))
        decode(model, steps=1)
        assert len(seen) == 2, "the prompt and one step"
        assert calls == [1], "the other block has none"
        handle.remove()
        same(decode(model), expected)
        assert len(seen) == 2
        seen.clear()
        calls.clear()


def test_hooks_of_the_block_and_of_all_modules_fire(calls: list[int]) -> None:
    model = make()
    seen: list[Tensor] = []
    handle = blocks(model)[1].register_forward_hook(lambda module, args, output: seen.append(output))
    decode(model, steps=1)
    handle.remove()
    assert [output.shape[1] for output in seen] == [12, 1]
    assert len(calls) == BLOCKS
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    decode(model, steps=1)
    handle.remove()
    assert names.count("LlamaMLP") == 2 * BLOCKS
    assert len(calls) == BLOCKS


@pytest.mark.parametrize("name", INSIDE)
def test_another_forward_inside_is_called(name: str, calls: list[int]) -> None:
    model = make()
    module, seen = blocks(model)[1].get_submodule(name), []
    decode(model, steps=1)
    calls.clear()
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return own(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
    decode(model, steps=1)
    assert len(seen) == 2
    assert calls == [1]


def test_a_changed_class_is_called(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    decode(model, steps=1)
    calls.clear()
    seen: list[int] = []
    own = modeling_llama.LlamaMLP.forward

    def forward(self: Any, x: Tensor) -> Any:
        seen.append(1)
        return own(self, x)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    decode(model, steps=1)
    assert len(seen) == 2 * BLOCKS
    assert not calls


class Adapter(nn.Module):
    """What adapters put in the place of a layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Any:
        return self.base(x) * 2


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj", "mlp.up_proj", "input_layernorm", "mlp.act_fn", "mlp", "self_attn"]
)
def test_another_module_inside_is_called(name: str, calls: list[int]) -> None:
    model = make()
    before = decode(model, steps=1)
    block = blocks(model)[1]
    parent, _, attribute = name.rpartition(".")
    replaced = block.get_submodule(name)

    class Twice(type(replaced)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    other = copy.copy(replaced)
    other.__class__ = Twice
    setattr(block.get_submodule(parent), attribute, other)
    calls.clear()
    found = decode(model, steps=1)
    assert calls == [1]
    assert not torch.equal(found, before)
    assert torch.equal(found, decode(plain(model), steps=1))
    setattr(block.get_submodule(parent), attribute, replaced)
    same(decode(model, steps=1), before)


def test_an_adapter_is_called(calls: list[int]) -> None:
    model = make()
    mlp = blocks(model)[0].mlp
    decode(model, steps=1)
    mlp.gate_proj = Adapter(mlp.gate_proj)
    calls.clear()
    found = decode(model, steps=1)
    assert calls == [1]
    assert torch.equal(found, decode(plain(model), steps=1))


@pytest.mark.parametrize("form", ["dense", "rotated", "wide factors", "two grids", "another activation"])
def test_other_forms_run_as_they_are(form: str, calls: list[int]) -> None:
    model = make()
    mlp = blocks(model)[0].mlp
    layer = mlp.up_proj
    if form == "dense":
        mlp.up_proj = nn.Linear(layer.in_features, layer.out_features, bias=False).bfloat16()
        fast_decoding(model)
    elif form == "rotated":
        mlp.up_proj = CompressedLinear(CompressedTensor(layer.tensor.parts, Rotation(layer.in_features, seed=3)))
    elif form == "wide factors":
        more = LowRank(torch.ones(layer.out_features, 1), torch.ones(1, layer.in_features))
        mlp.up_proj = CompressedLinear(CompressedTensor((*layer.tensor.parts, more)))
    elif form == "two grids":
        mlp.up_proj = CompressedLinear(CompressedTensor(2 * layer.tensor.parts))
    else:
        mlp.act_fn = nn.GELU()
    found = decode(model, steps=1)
    assert calls == [1]
    same(found, decode(plain(model), steps=1))


def test_gradients_and_training_take_the_modules(calls: list[int]) -> None:
    model = make(dtype=torch.float32)
    embedded = model.get_input_embeddings()(prompt(1, 4)).detach()
    results = []
    for one in (model, plain(model)):
        x = embedded.clone().requires_grad_()
        one(inputs_embeds=x).logits.square().sum().backward()
        results.append(x.grad)
    assert torch.equal(results[0], results[1])
    assert not calls
    model.train()
    decode(model, steps=1)
    assert not calls
    model.eval()
    decode(model, steps=1)
    assert len(calls) == BLOCKS


def test_autocast_and_other_kernels_take_the_modules(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        decode(model, steps=1)
    for kernels in ("reference", "native"):
        monkeypatch.setenv(KERNELS_VARIABLE, kernels)
        decode(model, steps=1)
    monkeypatch.delenv(KERNELS_VARIABLE)
    for asked in (torch.compiler, torch.jit):
        with monkeypatch.context() as patch:
            patch.setattr(asked, "is_compiling" if asked is torch.compiler else "is_tracing", lambda: True)
            decode(model, steps=1)
    assert not calls


def test_attention_of_another_kind_takes_the_modules(calls: list[int]) -> None:
    model = make(dtype=torch.float32)
    expected = decode(model)
    assert model.config._attn_implementation == BACKEND
    for implementation, fast in (("eager", False), ("sdpa", True), (BACKEND, True)):
        model.set_attn_implementation(implementation)
        calls.clear()
        same(decode(model), expected)
        assert bool(calls) is fast
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    calls.clear()
    with torch.no_grad():
        out = model(input_ids=prompt(1), past_key_values=cache, output_attentions=True, output_hidden_states=True)
        out = model(input_ids=prompt(1, 1), past_key_values=cache, output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in out.attentions] == [(1, 4, 1, 13)] * BLOCKS
    assert len(out.hidden_states) == BLOCKS + 1
    assert not calls
