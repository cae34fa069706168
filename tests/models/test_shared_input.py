"""Decoding with compressed layers: what was prepared, and what layers with one input share, changes no bit."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trimtab import compress
from trimtab.kernels import library
from trimtab.kernels.kv_attention import dense
from trimtab.kernels.op import KERNELS_VARIABLE
from trimtab.kernels.prepared import MAX_ROWS, PreparedProducts
from trimtab.models import attention, load, random_model, save
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.fast_decoding import fast_decoding
from trimtab.models.random import ALL_FAMILIES
from trimtab.models.shared_input import SharedInput
from trimtab.models.views import ModelView
from trimtab.tensors.base import Part
from trimtab.tensors.bitmap import Bitmap
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GridFormat, GroupGrid
from trimtab.tensors.low_rank import LowRank
from trimtab.tensors.rotation import Rotation
from trimtab.tensors.sparse_grid import SparseGrid
from trimtab.tensors.sparse_inputs import SparseInputs
from trimtab.tensors.table import LevelTable, TableFormat
from trimtab.weights.rtn import Rtn

pytestmark = pytest.mark.skipif(library.absent() is not None, reason="there are no native kernels here to prepare")

SHARING = (
    "2 bits",
    "3 bits",
    "4 bits",
    "8 bits",
    "asymmetric",
    "table",
    "with terms",
    "sparse",
    "sparse 4 bits",
    "columns",
)
FORMS = (*SHARING, "rotated", "groups along out")


def tensor(form: str, out_features: int, seed: int = 0) -> CompressedTensor:
    weight = torch.randn(out_features, 64, generator=torch.Generator().manual_seed(seed))
    if form == "table":
        return CompressedTensor((LevelTable.quantize(weight, TableFormat(group_size=32)),))
    if form == "columns":
        return CompressedTensor((SparseInputs.of(weight.bfloat16(), 4.0, 40, rank=2),))
    if form.startswith("sparse"):
        made = SparseGrid.from_dense if form == "sparse 4 bits" else Bitmap.from_dense
        return CompressedTensor((made(weight, weight > 0),))
    fmt = GridFormat.from_options(
        {
            "bits": int(form[0]) if form[0].isdigit() else 4,
            "group_size": 16,
            "symmetric": form != "asymmetric",
            "axis": "out" if form == "groups along out" else "in",
        }
    )
    parts: list[Part] = [GroupGrid.quantize(weight, fmt)]
    if form == "with terms":
        parts.append(LowRank(torch.randn(out_features, 2).bfloat16(), torch.randn(2, 64).bfloat16()))
    return CompressedTensor(tuple(parts), Rotation(64, seed=5) if form == "rotated" else None)


def three(form: str = "4 bits", *, shared: bool = True) -> list[CompressedLinear]:
    layers = [
        CompressedLinear(tensor(form, size, size), torch.randn(size).bfloat16() if size == 16 else None)
        for size in (48, 16, 32)
    ]
    if shared:
        together = SharedInput(layers)
        for layer in layers:
            layer.share(together)
    return layers


def module_by_module(model: PreTrainedModel) -> None:
    """Blocks that decode in native calls of their own share nothing."""
    for block in ModelView.of(model).blocks:
        block.module.__dict__.pop("forward", None)


def slow(layer: CompressedLinear, x: Tensor) -> Tensor:
    y = layer.tensor.matmul(x)
    return y if layer.bias is None else y + layer.bias


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each prepared call multiplied."""
    counts: list[int] = []
    run = PreparedProducts.run

    def counted(self: PreparedProducts, x: Tensor) -> tuple[Tensor, ...]:
        results = run(self, x)
        counts.append(len(results))
        return results

    monkeypatch.setattr(PreparedProducts, "run", counted)
    return counts


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 64), (2, 4, 64), (3, 3, 64), (64,), (0, 64), (1, 2, 1, 64)])
@torch.no_grad()
def test_bits_are_those_of_the_plain_product(form: str, shape: tuple[int, ...], calls: list[int]) -> None:
    layers = three(form)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(shape).to(dtype)
        for layer in layers:
            found, expected = layer(x), slow(layer, x)
            assert torch.equal(found, expected)
            assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    rows = torch.empty(shape).numel() // 64
    few = form in SHARING and len(shape) in (2, 3) and 0 < rows <= MAX_ROWS
    assert calls == ([3, 3, 3] if few else [])


def test_another_input_gets_another_product(calls: list[int]) -> None:
    q, k, v = three()
    with torch.inference_mode():
        x = torch.randn(1, 64).bfloat16()
        q(x)
        other = x.clone()
        assert torch.equal(k(other), slow(k, x)), "the same bytes elsewhere are the same input"
        other[0, 3] += 1
        assert torch.equal(v(other), slow(v, other))
        q(x)
        x[0, 3] += 1  # in place, which an inference tensor does not count
        assert torch.equal(k(x), slow(k, x))
        assert torch.equal(v(x.float()), slow(v, x.float()))
    assert calls == [3, 1, 3, 1, 1]


@torch.inference_mode()
def test_buffers_that_do_not_count_their_changes_are_not_shared(calls: list[int]) -> None:
    q, k, _ = three()
    x = torch.randn(1, 64).bfloat16()
    q(x)
    k.part0_scales.mul_(2)
    assert torch.equal(k(x), slow(k, x))
    assert calls == [1, 1]


@torch.no_grad()
def test_changed_buffers_are_seen() -> None:
    q, k, v = three()
    x = torch.randn(1, 64).bfloat16()
    for layer in (q, k, v):
        layer(x)
    q(x)
    k.part0_scales.mul_(2)
    v.part0_scales = v.part0_scales * 2
    assert torch.equal(k(x), slow(k, x))
    assert torch.equal(v(x), slow(v, x))
    q(x)
    k.part0_scales.data = k.part0_scales.data * 2
    assert torch.equal(k(x), slow(k, x))
    q.set_tensor(tensor("4 bits", 48, seed=9))
    assert torch.equal(q(x), slow(q, x))
    for layer in (q, k, v):
        layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)
        layer.part0_scales.mul_(3)
    for layer in (q, k, v):
        assert torch.equal(layer(x), slow(layer, x))


@torch.no_grad()
def test_a_product_is_given_out_once() -> None:
    q, k, _ = three()
    x = torch.randn(1, 64).bfloat16()
    q(x)
    k(x).zero_()
    assert torch.equal(k(x), slow(k, x))
    q(x).zero_()
    assert torch.equal(k(x), slow(k, x)), "the products lie apart"


@torch.no_grad()
def test_layers_come_and_go(calls: list[int]) -> None:
    q, k, v = three()
    x = torch.randn(1, 64).bfloat16()
    del v
    for layer in (q, k):
        assert torch.equal(layer(x), slow(layer, x))
    assert calls == [1, 1], "one of them is gone, so the others compute alone"
    q.share(None)
    assert torch.equal(q(x), slow(q, x))


@torch.no_grad()
def test_copies_share_nothing_with_the_originals() -> None:
    layers = three()
    x = torch.randn(1, 64).bfloat16()
    for layer in layers:
        layer(x)
    group = nn.ModuleList(layers)
    for other in (copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
        layers[0](x)
        for copied, layer in zip(other, layers, strict=True):
            copied.part0_scales.mul_(2)
            assert torch.equal(copied(x), slow(copied, x))
            assert not torch.equal(copied(x), layer(x))


def test_gradients_are_those_of_the_plain_product(calls: list[int]) -> None:
    layers = three("with terms")
    x = torch.randn(2, 64).bfloat16().requires_grad_()
    for layer in layers:
        (found,) = torch.autograd.grad(layer(x).float().square().sum(), x)
        (expected,) = torch.autograd.grad(slow(layer, x).float().square().sum(), x)
        assert torch.equal(found, expected)
        assert found.abs().sum() > 0
    assert not calls


@torch.no_grad()
def test_another_kernel_can_be_demanded(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = three()
    x = torch.randn(1, 64).bfloat16()
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    assert torch.equal(q(x), slow(q, x))
    assert torch.equal(k(x), slow(k, x))
    assert not calls


@torch.no_grad()
def test_threads_do_not_mix_their_inputs() -> None:
    layers = three()
    inputs = [torch.randn(1, 64).bfloat16() for _ in range(4)]
    expected = [[slow(layer, x) for layer in layers] for x in inputs]

    def work(number: int) -> bool:
        with torch.no_grad():
            return all(
                torch.equal(layer(inputs[number]), right)
                for _ in range(200)
                for layer, right in zip(layers, expected[number], strict=True)
            )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize("family", ALL_FAMILIES)
@torch.no_grad()
def test_models_decode_to_the_same_bits(family: str, calls: list[int]) -> None:
    model = random_model(family).bfloat16()
    compress(model, Rtn(bits=4, group_size=16), progress=False)
    module_by_module(model)
    names = list(model.state_dict())
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    seen: list[str] = []
    compressed = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    handle = compressed[1].register_forward_hook(lambda *_: seen.append("hook"))
    found = model(input_ids=tokens).logits
    assert seen == ["hook"]
    handle.remove()
    separate = {"phi3": 0, "gpt2": 0, "gpt_neox": 0, "opt": 1}.get(family, 2)  # sites with several layers, per block
    assert sum(count > 1 for count in calls) == 2 * separate
    for layer in compressed:
        layer.share(None)
    calls.clear()
    assert torch.equal(model(input_ids=tokens).logits, found)
    assert calls == [1] * len(compressed)
    assert list(model.state_dict()) == names


@torch.no_grad()
def test_loaded_models_share_too(tmp_path: object, calls: list[int]) -> None:
    model = random_model("llama").bfloat16()
    compress(model, Rtn(bits=4, group_size=16), progress=False)
    save(model, f"{tmp_path}/saved")
    loaded = load(f"{tmp_path}/saved")
    module_by_module(model)
    module_by_module(loaded)
    tokens = torch.tensor([[3, 1, 4]])
    expected = model(input_ids=tokens).logits
    calls.clear()
    assert torch.equal(loaded(input_ids=tokens).logits, expected)
    assert sorted(calls) == [1, 1, 1, 1, 2, 2, 3, 3]
    fast_decoding(loaded)  # again
    assert torch.equal(loaded(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_one_query_of_heads_that_share_keys(rows: int) -> None:
    query, key, value = (torch.randn(rows, heads, tokens, 16) for heads, tokens in ((8, 1), (2, 11), (2, 11)))
    query.requires_grad_()
    module = nn.Module()
    module.num_key_value_groups = 4  # type: ignore[assignment]
    found, _ = attention.attention(module, query, key, value, None, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3)
    assert found.shape == expected.shape == (rows, 1, 8, 16)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out.square().sum(), query)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients)
    mask = torch.ones(rows, 1, 1, 11, dtype=torch.bool)
    mask[:, :, :, :4] = False
    masked, _ = attention.attention(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(masked, sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)[0])
    assert not torch.allclose(masked, found)


@torch.no_grad()
def test_one_query_over_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    one_query, seen = dense.one_query, []
    monkeypatch.setattr(dense, "one_query", lambda *args: seen.append(1) or one_query(*args))  # type: ignore[func-returns-value]
    query, key, value = (torch.randn(2, heads, tokens, 16) for heads, tokens in ((8, 1), (2, 300), (2, 300)))
    module = nn.Module()
    module.num_key_value_groups = 4  # type: ignore[assignment]
    found, _ = attention.attention(module, query, key, value, None, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(found, expected)
    assert seen == ([] if library.machine_isas() == ("scalar",) else [1])
    attention.attention(module, query, key, value, None, scaling=0.3, dropout=0.5)
    assert len(seen) < 2, "the kernel has no dropout"


@torch.no_grad()
def test_compressed_models_take_one_query_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    compress(model, Rtn(bits=8, group_size=16), progress=False)
    one_query, seen = attention._one_query, []
    monkeypatch.setattr(attention, "_one_query", lambda *args: seen.append(1) or one_query(*args))  # type: ignore[func-returns-value]
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    expected = model(input_ids=tokens).logits[:, -1]
    assert not seen
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens[:, :-1], past_key_values=cache)
    found = model(input_ids=tokens[:, -1:], past_key_values=cache).logits[:, -1]
    assert len(seen) == 2, "once per block"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    model.set_attn_implementation("eager")
    fast_decoding(model)
    assert model.config._attn_implementation == "eager", "what was chosen stays"
