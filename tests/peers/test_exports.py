"""Exports in the libraries that they are for, and checkpoints that these libraries wrote in trimtab.

Where a reader computes in float32, its logits are ours. Where it computes otherwise, the bound says what that costs:
float16 weights and sums (about 3e-3 here), or llama.cpp's rounding of activations to 8 bits (about 2e-2 on random
weights).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import trimtab as tt
from tests.models.compressing import logits
from tests.models.exports.making import compressed, each, grids, llama, same_layers, with_low_rank
from tests.models.exports.readers import gguf_weight, read_gguf
from trimtab.models import random_model
from trimtab.models.exports import export
from trimtab.models.exports.base import Source
from trimtab.models.exports.gguf import Gguf

pytestmark = pytest.mark.peers

TOKENS = torch.randint(3, 131, (2, 48), generator=torch.Generator().manual_seed(5))


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


KINDS: dict[str, Callable[[Any], dict[str, Any] | None]] = {
    "symmetric 4": lambda linear: {"bits": 4, "group_size": 32},
    "asymmetric 4": lambda linear: {"bits": 4, "group_size": 32, "symmetric": False},
    "asymmetric 3": lambda linear: {"bits": 3, "group_size": 16, "symmetric": False},
    "symmetric 2": lambda linear: {"bits": 2, "group_size": 32, "scale_dtype": "bfloat16"},
    "channel 8": lambda linear: {"bits": 8, "group_size": -1},
    "channel asymmetric 4": lambda linear: {"bits": 4, "group_size": -1, "symmetric": False},
    "mixed": lambda linear: (
        None
        if linear.role == "o"
        else {
            "bits": {"q": 2, "k": 3, "v": 8, "gate": 4, "up": 4, "down": 8}[linear.role],
            "group_size": -1 if linear.role == "v" else 32,
            "symmetric": linear.block == 0,
        }
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_compressed_tensors(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = each(llama(), KINDS[kind])
    export(model, tmp_path / "out", format="compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    assert torch.equal(logits(theirs, TOKENS), logits(model, TOKENS))


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_transformers_rounds_scales_to_the_models_dtype(scale_dtype: str, tmp_path: Path) -> None:
    """A bfloat16 model reads bfloat16 scales as they are, and rounds float16 scales, of which the documents warn."""
    pytest.importorskip("compressed_tensors")
    model = grids(llama(dtype=torch.bfloat16), bits=4, group_size=32, scale_dtype=scale_dtype)
    export(model, tmp_path / "out", format="compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs(TOKENS)
    layer = compressed(model)["model.layers.0.mlp.up_proj"]
    same = torch.equal(theirs.model.layers[0].mlp.up_proj.weight, layer.dequantize(torch.bfloat16))
    assert same == (scale_dtype == "bfloat16")
    assert apart(logits(theirs, TOKENS), logits(model, TOKENS)) < 0.03


def test_transformers_reads_the_reference_model(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    tt.save(grids(tt.load("ref"), bits=4, group_size=64, symmetric=False), tmp_path / "saved")
    model = tt.load(tmp_path / "saved", dtype="float32")
    export(model, tmp_path / "out", format="compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer("The old house by the river was empty.", return_tensors="pt")["input_ids"]
    assert apart(logits(theirs, tokens), logits(model, tokens)) < 1e-5  # our kernel adds up in another order


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_auto_round_reads_gptq(bits: int, tmp_path: Path) -> None:
    """Through transformers, on the CPU, with auto-round's own layers for this layout; it computes in float16."""
    pytest.importorskip("auto_round")
    from transformers import AutoRoundConfig

    model = grids(llama(vocab_size=160), bits=bits, group_size=32)
    export(model, tmp_path / "out", format="gptq")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=AutoRoundConfig(backend="torch"), device_map="cpu"
    )
    assert "auto_round" in type(theirs.model.layers[0].mlp.up_proj).__module__
    assert apart(logits(theirs, TOKENS), logits(model, TOKENS)) < 5e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("version", "module"), [("gptq", "qlinear_torch_zp"), ("gptq_v2", "qlinear_torch")])
def test_auto_rounds_layers_read_both_versions(bits: int, version: str, module: str, tmp_path: Path) -> None:
    """Asymmetric too: the same product for the layer's tensors as they lie in the file."""
    import importlib

    from safetensors.torch import load_file

    pytest.importorskip("auto_round")
    reader = importlib.import_module(f"auto_round_extension.torch.{module}").QuantLinear
    model = grids(llama(num_hidden_layers=1), bits=bits, group_size=32, symmetric=False)
    for layer in compressed(model).values():
        layer.stored()["part0_zeros"].clamp_(min=1)
    export(model, tmp_path / "out", format="gptq", checkpoint_format=version)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in compressed(model).items():
        theirs = reader(bits, 32, layer.in_features, layer.out_features, bias=False)
        theirs.load_state_dict({key: tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales")})
        found = theirs(torch.eye(layer.in_features)).t()
        assert apart(found, layer.dequantize()) < 1e-3


def llama_cpp_logits(file: Path, tokens: list[int]) -> Tensor:
    import llama_cpp

    session = llama_cpp.Llama(str(file), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    session.eval(tokens)
    found = torch.tensor(session.scores[: len(tokens)].copy())
    session.close()
    del session
    gc.collect()
    return found


SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, scaled rotary": ("llama", {"rope_parameters": ROPE}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
GRIDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "q4_0": ({"bits": 4, "group_size": 64}, {}, "q4_0"),
    "q4_1": ({"bits": 4, "group_size": 32, "symmetric": False}, {}, "q4_1"),
    "q8_0": ({"bits": 8, "group_size": 32}, {}, "q8_0"),
    "q2_k": ({"bits": 2, "group_size": 256, "symmetric": False}, {}, "q2_k"),
    "q3_k": ({"bits": 3, "group_size": -1}, {}, "q3_k"),
    "q4_k": ({"bits": 4, "group_size": 256, "symmetric": False}, {}, "q4_k"),
    "q6_k": ({"bits": 4, "group_size": 256}, {"type": "q6_k"}, "q6_k"),
    "f32": ({"bits": 3, "group_size": 16}, {"type": "f32"}, "f32"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grid", ["q4_0", "f32"])
def test_llama_cpp_reads_architectures(name: str, grid: str, tmp_path: Path) -> None:
    _check_llama_cpp(name, grid, tmp_path)


@pytest.mark.parametrize("grid", GRIDS)
def test_llama_cpp_reads_block_types(grid: str, tmp_path: Path) -> None:
    _check_llama_cpp("llama", grid, tmp_path)


def _check_llama_cpp(name: str, grid: str, tmp_path: Path) -> None:
    """The logits are ours up to the rounding of activations, and up to float16 sums once the same numbers are f32."""
    pytest.importorskip("llama_cpp")
    family, options = MODELS[name]
    fmt, choice, stored_as = GRIDS[grid]
    model = grids(random_model(family, 3, **SIZES, **options), **fmt)
    done = export(model, tmp_path / "m.gguf", format="gguf", tokenizer="none", **choice)
    assert {entry["stored_as"] for entry in done.layers} == {stored_as}
    tokens = TOKENS[0].tolist()
    expected = logits(model, TOKENS[:1])[0]
    bound = {"f32": 2e-3, "q2_k": 6e-2, "q3_k": 6e-2}.get(stored_as, 4e-2)
    assert apart(llama_cpp_logits(tmp_path / "m.gguf", tokens), expected) < bound
    if stored_as != "f32":  # what the blocks say, read by another reader, written as numbers
        _as_numbers(model, tmp_path / "m.gguf", tmp_path / "numbers.gguf")
        assert apart(llama_cpp_logits(tmp_path / "numbers.gguf", tokens), expected) < 2e-3


def _as_numbers(model: PreTrainedModel, blocks: Path, out: Path) -> None:
    """The file with every tensor as float32, as an independent reader finds it."""
    import gguf

    export(model, out, format="gguf", type="f32", tokenizer="none")
    _, tensors = read_gguf(blocks)
    copy = gguf.GGUFReader(out, "r+")
    for tensor in copy.tensors:
        tensor.data[:] = gguf_weight(*tensors[tensor.name]).astype("float32")
    copy.data.flush()


def test_llama_cpp_reads_dense_models(tmp_path: Path) -> None:
    """What the writer does to uncompressed tensors alone."""
    pytest.importorskip("llama_cpp")
    for dense, bound in (("f32", 1e-3), ("f16", 2e-3), ("bf16", 1.5e-2)):
        model = random_model("llama", 3, **SIZES)
        form = Gguf(tokenizer="none", dense=dense)  # type: ignore[arg-type]
        file = tmp_path / f"{dense}.gguf"
        form.write(Source.of(model), file, file)
        assert apart(llama_cpp_logits(file, TOKENS[0].tolist()), logits(model, TOKENS[:1])[0]) < bound


def test_llama_cpp_reads_the_reference_model_with_its_tokenizer(tmp_path: Path) -> None:
    """The same tokens for any text, logits near ours, and the same words by greedy decoding."""
    llama_cpp = pytest.importorskip("llama_cpp")
    tt.save(grids(tt.load("ref"), bits=4, group_size=64), tmp_path / "saved")
    model = tt.load(tmp_path / "saved", dtype="float32")
    export(model, tmp_path / "ref.gguf", format="gguf")
    session = llama_cpp.Llama(str(tmp_path / "ref.gguf"), n_ctx=512, logits_all=True, verbose=False, n_threads=1)
    tokenizer = model.trimtab.tokenizer
    texts = [
        "The old house, by the river; it's 1234 years old. I'LL don't!\n\n\tTabs  and   spaces \n",
        "naïve café, Größe, 漢字 🙂 x=3.14e-10 … “quoted”",
        (Path(__file__).parents[2] / "README.md").read_text(),
    ]
    for text in texts:
        assert session.tokenize(text.encode(), add_bos=True, special=False) == tokenizer(text)["input_ids"]
    ids = tokenizer(texts[2])["input_ids"][:200]
    session.eval(ids)
    found = torch.tensor(session.scores[:200].copy()).log_softmax(dim=-1)
    expected = logits(model, torch.tensor([ids]))[0].log_softmax(dim=-1)
    divergence = (expected.exp() * (expected - found)).sum(dim=-1).mean()
    assert divergence < 1e-3
    prompt = "Once upon a time"
    said = session.create_completion(prompt, max_tokens=12, temperature=0)["choices"][0]["text"]
    start = torch.tensor([tokenizer(prompt)["input_ids"]])
    ours = model.generate(start, max_new_tokens=12, do_sample=False)[0, start.shape[1] :]
    assert said == tokenizer.decode(ours)
    session.close()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    "options", [{}, {"alpha": 16}, {"alpha": 1}, {"alpha": 12, "use_rslora": True}, {"base": "compressed-tensors"}]
)
def test_peft_reads_adapters(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    if family == "gpt2" and "base" in options:
        pytest.skip("compressed-tensors has no Conv1D; the refusal is tested with the others")
    model = with_low_rank(random_model(family))
    expected = logits(model, TOKENS)
    export(model, tmp_path / "out", format="peft", **options)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    assert apart(logits(base, TOKENS), expected) > 0.1
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    assert apart(logits(theirs, TOKENS), expected) < 2e-6
    if "base" not in options:
        assert apart(logits(theirs.merge_and_unload(), TOKENS), expected) < 2e-6


def _with_tokenizer(directory: Path) -> PreTrainedModel:
    """A random model from a directory, as these libraries want it."""
    model = llama(hidden_size=128, intermediate_size=256, head_dim=64, vocab_size=4096, dtype=torch.bfloat16)
    model.trimtab = tt.load("ref").trimtab
    tt.save(model, directory)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory)
    return loaded


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_checkpoints_of_llm_compressor_are_read(scheme: str, tmp_path: Path) -> None:
    """Written by the library, read by transformers with it and by trimtab without it: the same logits."""
    pytest.importorskip("llmcompressor")
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = _with_tokenizer(tmp_path / "dense")
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
    model.save_pretrained(tmp_path / "out", save_compressed=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = tt.load(tmp_path / "out", dtype="float32")
    assert len(compressed(ours)) == 14
    assert apart(logits(ours, TOKENS), logits(theirs, TOKENS)) < 1e-6
    export(ours, tmp_path / "again", format="compressed-tensors")
    assert same_layers(tt.load(tmp_path / "again"), ours)


def test_gptq_checkpoints_of_auto_round_are_read(tmp_path: Path) -> None:
    pytest.importorskip("auto_round")
    from auto_round import AutoRound
    from transformers import AutoRoundConfig

    model = _with_tokenizer(tmp_path / "dense")
    # one known batch, and no search: the library would fetch calibration text
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(tmp_path / "dense"),
        bits=4,
        group_size=32,
        sym=True,
        iters=0,
        disable_opt_rtn=True,
        dataset=[{"input_ids": TOKENS}],
    )
    rounding.quantize_and_save(str(tmp_path / "out"), format="auto_gptq")
    config = next((tmp_path / "out").rglob("config.json"))
    ours = tt.load(config.parent)
    assert len(compressed(ours)) == 14
    theirs = AutoModelForCausalLM.from_pretrained(
        config.parent, quantization_config=AutoRoundConfig(backend="torch"), device_map="cpu"
    )
    assert apart(logits(ours, TOKENS), logits(theirs, TOKENS)) < 5e-3
