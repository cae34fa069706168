"""Calibration of a model of a billion parameters stays within the memory that a small machine has."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_PROGRAM = """
import json, resource, torch
from transformers import LlamaConfig, LlamaForCausalLM
from trimtab.models.calibration import gather_dense
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.views import ModelView

config = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=15, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
)
model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
tokens = torch.randint(0, 32000, (2, 1024), generator=torch.Generator().manual_seed(0))
text = CalibrationSet.from_tokens(tokens)
view = ModelView.of(model)
needs = {site: {"gram", "abs_max", "mean_abs", "reservoir"} for block in view.blocks for site in block.sites}
sites = sum(len(statistics) for statistics in gather_dense(view, text, needs))
print(json.dumps({
    "parameters": sum(p.numel() for p in model.parameters()),
    "sites": sites,
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""


@pytest.mark.slow
def test_all_statistics_of_a_billion_parameters_take_less_than_8_gib() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(told)
    assert told["parameters"] > 1.0e9
    assert told["sites"] == 15 * 4
    assert told["peak_bytes"] < 8 * 2**30
