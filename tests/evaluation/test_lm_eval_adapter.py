"""The adapter under the real harness, compared with the harness's own model class. Needs the [peers] environment."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.core.errors import ConfigError, MissingExtra

from .conftest import CORPUS, small_tokenizer

TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    },
    "roll": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def test_without_the_harness_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trimtab.evaluation.lm_eval_adapter", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"pip install 'trimtab\[peers\]'"):
        importlib.import_module("trimtab.evaluation.lm_eval_adapter")


needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval (make peers)")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = CORPUS.split()
    lines = [
        {
            "question": " ".join(words[i : i + 5 + 3 * i]),
            "choices": [words[i + 7], words[i + 3], "the road"],
            "label": i % 3,
            "text": " ".join(words[: 20 + 60 * i]),
        }
        for i in range(6)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    for name, settings in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
            "test_split": "test",
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(common | settings))  # JSON is YAML
    return tmp_path


@pytest.mark.peers
@needs_harness
@pytest.mark.parametrize("bos", [True, False])
def test_answers_are_those_of_the_harness_itself(
    model: LlamaForCausalLM, bos: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = small_tokenizer(bos)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from trimtab.evaluation.lm_eval_adapter import TrimtabLM

    def answers(harness_model: object) -> dict[str, list[object]]:
        found = lm_eval.simple_evaluate(
            model=harness_model,
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
        return {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}

    ours = answers(TrimtabLM(pretrained=model, tokenizer=tokenizer))
    theirs = answers(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, add_bos_token=bos))
    assert ours["write"] == theirs["write"]
    # Of a tokenizer that adds BOS, the harness scores that BOS too, after a second one: whole texts differ by design.
    for name in ("choose",) if bos else ("choose", "roll"):
        assert numbers(ours[name]) == pytest.approx(numbers(theirs[name]), abs=1e-3)
        assert len(numbers(ours[name])) >= 6


def numbers(value: object) -> list[float]:
    """All numbers in nested lists."""
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in numbers(item)]
    return [float(value)]  # type: ignore[arg-type]


@pytest.mark.peers
@needs_harness
def test_registered_name_and_refusals(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from trimtab.evaluation.lm_eval_adapter import TrimtabLM

    assert get_model("trimtab") is TrimtabLM
    adapter = TrimtabLM(model, tokenizer, batch_size="auto")

    def asked(**options: object) -> list[Instance]:
        return [Instance("generate_until", {}, ("The king", {"max_gen_toks": 4, **options}), 0)]

    assert adapter.generate_until(asked(until="."))
    with pytest.raises(ConfigError, match="greedily"):
        adapter.generate_until(asked(do_sample=True, temperature=0.7))
    with pytest.raises(ConfigError, match="typical_p"):
        adapter.generate_until(asked(typical_p=0.3))
    (text,) = adapter.generate_until([Instance("generate_until", {}, ("the " * 400, {"max_gen_toks": 4}), 0)])
    assert isinstance(text, str)
    assert adapter.client.truncated == 1
