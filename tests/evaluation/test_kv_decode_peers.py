"""The other libraries beside which kv-decode measures: the same weights give the same logits, and each of them runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trimtab.evaluation.kv_decode import Setting, _run, choose
from trimtab.evaluation.kv_decode.llama_cpp_session import GGUF_FILE, LlamaCppSession
from trimtab.models import random_model
from trimtab.models.exports.base import Source
from trimtab.models.exports.gguf import Gguf

pytestmark = pytest.mark.peers

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("weight_type", "bound"), [("f32", 1e-3), ("f16", 2e-3), ("bf16", 1.5e-2)])
def test_exported_model_gives_the_same_logits(weight_type: str, bound: float, tied: bool, tmp_path: Path) -> None:
    """After reading a prompt. llama.cpp's attention to single queries adds up in float16, so steps are further away."""
    pytest.importorskip("llama_cpp")
    model = random_model("llama", 3, tie_word_embeddings=tied, **SIZES)
    file = tmp_path / GGUF_FILE
    Gguf.from_options({"dense": weight_type, "tokenizer": "none"}).write(Source.of(model), file, file)
    setting = Setting(context=200, steps=3, vocabulary=300, seed=5)
    tokens = setting.tokens()
    session = LlamaCppSession(file, setting, "f16")
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([tokens])).logits[0]
    session.prefill(tokens[:-3])
    found = [torch.tensor(session.logits())]
    for token in tokens[-3:]:
        session.step(token)
        found.append(torch.tensor(session.logits()))
    errors = (torch.stack(found) - expected[-4:]).norm(dim=-1) / expected[-4:].norm(dim=-1)
    assert errors[0] < bound
    assert errors.max() < bound + 1e-2
    # 2 layers, keys and values, 2 KV heads, 32 dimensions, 2 bytes
    assert session.kv_bytes() == pytest.approx(len(tokens) * 2 * 2 * 2 * 32 * 2, rel=0.05)


def test_every_peer_runs() -> None:
    setting = Setting(
        context=256, steps=3, layers=2, hidden=256, query_heads=4, kv_heads=2, head_dim=64, mlp=256, vocabulary=300
    )
    systems = choose(["transformers", "kvpress", "llama.cpp"])
    entries = {entry["system"]: entry for entry in _run.run(systems, setting, threads=1)}
    failed = {name: entry for name, entry in entries.items() if "error" in entry}
    assert not failed
    held = {name: entry["kv_bytes"] for name, entry in entries.items() if "skipped" not in entry}
    full = held["transformers/dynamic-bf16"]
    assert full == 259 * 2 * 2 * 2 * 64 * 2
    assert all(held[name] < full for name in held if name not in ("transformers/dynamic-bf16", "llama.cpp/f16"))
