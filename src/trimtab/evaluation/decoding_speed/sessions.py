"""The systems of `trimtab bench decoding`, opened: each in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab import models
from trimtab.core.registry import method_class
from trimtab.decoding import Decoder, Sampling
from trimtab.evaluation.decoding_speed.measure import Setting, Written
from trimtab.models.random import random_model

PROMPTS_FILE = "prompts.json"
TARGET, DRAFT = "target", "draft"


class _Transformers:
    """generate() of transformers, with `ref-mini` as the assistant or without one."""

    def __init__(self, directory: Path, setting: Setting, *, assisted: bool) -> None:
        self.prompts = read_prompts(directory)
        self._model = models.load(directory / TARGET)
        self._setting = setting
        self._forwards = 0
        self._model.register_forward_pre_hook(self._count)
        self._options: dict[str, Any] = {}
        if assisted:
            assistant = models.load(directory / DRAFT)
            config: Any = assistant.generation_config
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = setting.depth, "constant"
            config.assistant_confidence_threshold = 0.0
            self._options["assistant_model"] = assistant

    def _count(self, *_: object) -> None:
        self._forwards += 1

    def write(self, prompt: list[int]) -> Written:
        self._forwards = 0
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            model: Any = self._model
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._setting.steps,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **self._options,
            )
        return Written(output[0, len(prompt) :].tolist(), self._forwards)


class _Trimtab:
    """The decoding loop with one method, or without a draft."""

    def __init__(self, directory: Path, setting: Setting, decoder: Decoder) -> None:
        self.prompts = read_prompts(directory)
        self._decoder = decoder
        self._sampling = Sampling(max_new_tokens=setting.steps, seed=setting.seed)

    def write(self, prompt: list[int]) -> Written:
        done = self._decoder.generate([prompt], self._sampling)
        return Written(done.tokens[0], done.ledger.target_forwards, done.ledger.accepted_by_depth)


def open_transformers(directory: Path, setting: Setting, *, assisted: bool) -> _Transformers:
    """Plain or assisted generation."""
    return _Transformers(directory, setting, assisted=assisted)


def open_trimtab(
    directory: Path, setting: Setting, *, method: str | None, draft: str, adapt: bool, options: Mapping[str, Any]
) -> _Trimtab:
    """`draft` is a name of the room's, or "random": a model of the draft's size that has learnt nothing."""
    target = models.load(directory / TARGET)
    drafts = {"ref-mini": models.load(directory / DRAFT)}
    if draft == "random":
        drafts["random"] = untrained(drafts["ref-mini"], setting.seed)
    methods = []
    if method is not None:
        cls: Any = method_class(method)
        own = dict(options)
        if "branching" in own:
            own["branching"] = tuple((*own["branching"], *[1] * setting.depth)[: setting.depth])
        else:
            own["depth"] = setting.depth
        methods.append(cls(draft=draft, **own))
    return _Trimtab(directory, setting, Decoder(target, methods, drafts=drafts, adapt=adapt))


def untrained(like: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same size that has learnt nothing."""
    config = like.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {
        name: getattr(config, name) for name in (*names, "vocab_size", "max_position_embeddings", "tie_word_embeddings")
    }
    return random_model("llama", seed, dtype=like.dtype, **sizes)


def read_prompts(directory: Path) -> list[list[int]]:
    """Token ids of the prompts."""
    found: list[list[int]] = json.loads((directory / PROMPTS_FILE).read_text(encoding="utf-8"))
    return found
