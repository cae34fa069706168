"""Blocks that decode in two native calls: the same model in every respect but speed, and plain where anybody looks."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.models.llama import modeling_llama

import trimtab as tt
from trimtab import compress
from trimtab.kernels import library
from trimtab.kernels.block_step import MAX_ROWS, PreparedBlock
from trimtab.kernels.op import KERNELS_VARIABLE
from trimtab.models import fast_block, random_model
from trimtab.models.attention import BACKEND
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.fast_decoding import fast_decoding
from trimtab.models.views import ModelView
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.low_rank import LowRank, svd
from trimtab.tensors.rotation import Rotation
from trimtab.tensors.sparse import SparseOutliers
from trimtab.weights.rtn import Rtn

pytestmark = pytest.mark.skipif(library.absent() is not None, reason="there are no native kernels here")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BLOCKS = 2


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRIMTAB_KERNELS", "TRIMTAB_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of x of every native step."""
    rows: list[int] = []
    after = PreparedBlock.after

    def counted(self: PreparedBlock, attended: Tensor, x: Tensor) -> Tensor:
        rows.append(x.shape[0] * x.shape[1])
        return after(self, attended, x)

    monkeypatch.setattr(PreparedBlock, "after", counted)
    return rows


def make(family: str = "llama", dtype: torch.dtype = torch.bfloat16, bits: int = 4) -> PreTrainedModel:
    model = random_model(family, dtype=dtype)
    return compress(model, Rtn(bits=bits, group_size=16), progress=False)


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that runs module by module, with the same tensors."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, memo)
    assert not any(isinstance(block.__dict__.get("forward"), fast_block._FewTokens) for block in blocks(other))
    return other


def blocks(model: PreTrainedModel) -> list[Any]:
    return [block.module for block in ModelView.of(model).blocks]


def prompt(rows: int, length: int = 12) -> Tensor:
    return torch.randint(3, 131, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def decode(model: PreTrainedModel, rows: int = 1, steps: int = 3, cache: Any = None, padding: int = 0) -> Tensor:
    """Logits [rows, steps, vocabulary] of tokens that follow a prompt; `padding` on the left of every other row."""
    ids, mask = prompt(rows), None
    cache = DynamicCache(config=model.config) if cache is None else cache
    if padding:
        mask = torch.ones_like(ids)
        mask[::2, :padding] = 0
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    logits = []
    for step in range(steps):
        if mask is not None:
            mask = torch.cat((mask, torch.ones(rows, 1, dtype=mask.dtype)), 1)
        positions = None if mask is None else mask.cumsum(1)[:, -1:] - 1
        tokens = prompt(rows, 40)[:, 20 + step, None]
        out = model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def same(found: Tensor, expected: Tensor) -> None:
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        return
    unit = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.float(), expected.float(), atol=16 * unit, rtol=16 * unit)
    assert (found.float() - expected.float()).norm() < unit * expected.float().norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_those_of_the_modules(family: str, dtype: torch.dtype, calls: list[int]) -> None:
    model = make(family, dtype)
    modules = plain(model)
    for rows in (1, 2, 3, MAX_ROWS):
        for padding in (0, 4):
            expected = decode(modules, rows, padding=padding)
            assert not calls
            same(decode(model, rows, padding=padding), expected)
            assert calls == [rows] * 3 * BLOCKS
            calls.clear()
    decode(model, MAX_ROWS + 1)
    assert not calls


def test_a_few_tokens_of_each_row_go_together(calls: list[int]) -> None:
    model = make(dtype=torch.float32)
    with torch.no_grad():
        for rows, length in ((1, 5), (2, 4)):
            ids = prompt(rows, length)
            expected = plain(model)(input_ids=ids).logits
            same(model(input_ids=ids).logits, expected)
            same(model(input_ids=ids, use_cache=False).logits, expected)
    assert calls == [5] * 4 + [8] * 4


def test_without_residual_or_with_another_norm_it_is_another_model(calls: list[int]) -> None:
    """What `same` lets pass is far smaller than what a mistake in a block changes."""
    model = make(dtype=torch.bfloat16)
    expected = decode(plain(model))
    blocks(model)[0].post_attention_layernorm.variance_epsilon *= 1e4
    with pytest.raises(AssertionError):
        same(decode(model), expected)
    blocks(model)[0].post_attention_layernorm.variance_epsilon /= 1e4
    same(decode(model), expected)
    after = PreparedBlock.after
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreparedBlock, "after", lambda self, attended, x: after(self, attended, torch.zeros_like(x)))
        with pytest.raises(AssertionError):
            same(decode(model), expected)


METHODS = [None, tt.cache.Exact(), tt.cache.Streaming(window=8, sinks=2)]


@pytest.mark.parametrize("method", METHODS, ids=["static", "exact", "streaming"])
@pytest.mark.parametrize("padding", [0, 4])
def test_every_cache_sees_what_it_always_saw(method: Any, padding: int, calls: list[int]) -> None:
    model = make(dtype=torch.float32)
    modules = plain(model)

    def cache(of: PreTrainedModel) -> Any:
        return StaticCache(config=of.config, max_cache_len=32) if method is None else method.new(of)

    expected = decode(modules, 3, 8, cache(modules), padding)
    calls.clear()
    same(decode(model, 3, 8, cache(model), padding), expected)
    assert calls == [3] * 8 * BLOCKS


def test_sliding_windows_are_kept(calls: list[int]) -> None:
    model = make("mistral", torch.float32)  # with a window of 24
    expected = decode(plain(model), 2, 18)
    same(decode(model, 2, 18), expected)
    assert len(calls) == 18 * BLOCKS


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


def _scale(layer: CompressedLinear) -> None:
    layer.part0_scales.mul_(2)


def _exchange(layer: CompressedLinear) -> None:
    layer.part0_scales = layer.part0_scales * 2


def _move(layer: CompressedLinear) -> None:
    layer.part0_scales.data = layer.part0_scales.data * 2


def _set(layer: CompressedLinear) -> None:
    state = {name: tensor.clone() for name, tensor in layer.tensor.state().items()}
    state["0.scales"] *= 2
    layer.set_tensor(CompressedTensor.from_state(layer.spec, state))


def _bias(layer: CompressedLinear) -> None:
    layer.bias = nn.Parameter(torch.ones(layer.out_features).bfloat16(), requires_grad=False)


@pytest.mark.parametrize("change", [_scale, _exchange, _move, _set, _bias])
def test_changed_layers_are_seen(change: Callable[[CompressedLinear], None], calls: list[int]) -> None:
    model = make()
    before = decode(model)
    layer = blocks(model)[1].mlp.down_proj
    change(layer)
    calls.clear()
    found = decode(model)
    assert calls == [1] * 3 * BLOCKS
    same(found, decode(plain(model)))
    assert not torch.equal(found, before)


def test_changed_norms_are_seen(calls: list[int]) -> None:
    model = make()
    norm = blocks(model)[1].input_layernorm
    expected = decode(model)
    for change in (
        lambda: norm.weight.data.mul_(-1),
        lambda: setattr(norm.weight, "data", norm.weight.data * -1),
        lambda: setattr(norm, "weight", nn.Parameter(norm.weight.detach() * -1)),
    ):
        change()
        found = decode(model)
        assert not torch.equal(found, expected)
        expected = decode(plain(model))
        same(found, expected)
    assert calls == [1] * 4 * 3 * BLOCKS


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_terms_are_part_of_the_step(family: str, dtype: torch.dtype, calls: list[int]) -> None:
    model = make(family, dtype, bits=2)
    before = decode(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CompressedLinear):
            generator = torch.Generator().manual_seed(len(name))
            error = (
                0.3 * layer.in_features**-0.5 * torch.randn(layer.out_features, layer.in_features, generator=generator)
            )
            kept = SparseOutliers.select(error, 0.02)
            low = svd(error - kept.dequantize(), 4, dtype=torch.bfloat16)
            parent, _, attribute = name.rpartition(".")
            other = CompressedLinear(CompressedTensor((*layer.tensor.parts, kept, low)), layer.bias)
            setattr(model.get_submodule(parent), attribute, other)
    calls.clear()
    found = decode(model, 3, padding=4)
    assert calls == [3] * 3 * BLOCKS
    same(found, decode(plain(model), 3, padding=4))
    assert not torch.equal(decode(model), before)
    blocks(model)[0].mlp.up_proj.part2_left.mul_(5)
    same(decode(model), decode(plain(model)))


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


def test_the_model_stays_what_it_was(tmp_path: object, calls: list[int]) -> None:
    model = make()
    raw = random_model("llama", dtype=torch.bfloat16)
    assert [type(block) for block in blocks(model)] == [type(block) for block in blocks(raw)]
    assert not [
        name for name in model.state_dict() if "layers.0" in name and "part0" not in name and "norm" not in name
    ]
    expected = decode(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        calls.clear()
        same(decode(other), expected)
        assert not calls, "copies are plain"
        fast_decoding(other)
        same(decode(other), expected)
        assert calls == [1] * 3 * BLOCKS
        blocks(other)[0].mlp.up_proj.part0_scales.mul_(2)
        assert not torch.equal(decode(other), decode(model))
    tt.save(model, f"{tmp_path}/saved")
    calls.clear()
    same(decode(tt.load(f"{tmp_path}/saved")), expected)
    assert calls == [1] * 3 * BLOCKS


def test_calling_it_again_changes_nothing(calls: list[int]) -> None:
    model = make()
    expected, forwards = decode(model), [block.forward for block in blocks(model)]
    fast_decoding(model)
    assert [block.forward for block in blocks(model)] == forwards
    blocks(model)[0].forward = own = lambda *args, **kwargs: type(blocks(model)[0]).forward(
        blocks(model)[0], *args, **kwargs
    )
    calls.clear()
    fast_decoding(model)
    assert blocks(model)[0].forward is own, "what somebody else has put there stays"
    same(decode(model), expected)
    assert calls == [1] * 3


def test_a_block_is_not_kept_alive() -> None:
    model = make()
    decode(model)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(blocks(model)[0])
        del model.model.layers[0]
        assert gone() is None
    finally:
        gc.enable()


def test_reasons_are_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_block, "_logged", set())
    model = make()
    for block in blocks(model):
        block.mlp.up_proj.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.INFO, "trimtab.models"):
        decode(model)
        decode(model)
    told = [record.message for record in caplog.records if "two native calls" in record.message]
    assert len(told) == 1
    assert "a module inside has a hook" in told[0]
