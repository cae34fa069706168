"""transformers learns of trimtab's checkpoints in whichever order the two are imported, and not before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import trimtab as tt
from trimtab.models.random import random_model
from trimtab.models.registration import register, register_when_transformers_loads

from .compressing import compress_all


def run(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_trimtab_is_light() -> None:
    heavy = run("import sys, trimtab; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])")
    assert heavy == "[]"


def test_importing_trimtab_takes_little_time() -> None:
    """Processor time beyond bare Python's, best of five: a busy machine does not count."""
    code = "import time; t = time.process_time(); import trimtab; print(time.process_time() - t)"
    assert min(float(run(code)) for _ in range(5)) < 0.05


def test_transformers_imported_afterwards(tmp_path: Path) -> None:
    tt.save(compress_all(random_model("llama")), tmp_path / "out")
    code = """
import sys, trimtab
assert "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
import transformers.quantizers.auto as auto, inspect
assert "trimtab" in auto.AUTO_QUANTIZER_MAPPING
assert type(auto.__loader__).__module__ != "trimtab.models.registration"
assert "def register_quantizer" in inspect.getsource(auto)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    assert run(code, str(tmp_path / "out")) == "CompressedLinear"


def test_registering_again_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before, watching = dict(AUTO_QUANTIZER_MAPPING), len(sys.meta_path)
    register()
    register_when_transformers_loads()
    assert before == AUTO_QUANTIZER_MAPPING
    assert "trimtab" in before
    assert len(sys.meta_path) == watching
