"""Small random models of every family, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimtab.models.families import family_named

ALL_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt2", "gpt_neox")


def random_model(
    family: str, seed: int = 0, *, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model of the family, in evaluation mode; equal seeds and options give equal weights.

    `overrides` are options of the Hugging Face configuration; the defaults make a model of about 0.1 M weights with
    two blocks, four heads (two key-value heads where the family allows) and 131 tokens. Weights are drawn with
    spread 1/sqrt(in), and biases and norm gains are random too, so that logits depend on every part.
    Raises ConfigError for an unknown family.
    """
    known = family_named(family)
    config = AutoConfig.for_model(known.model_type, **{**known.small, **overrides})
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                # norm gains stay near the one (or zero) they start at, so that activations keep their scale
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * min(parameter.shape) ** -0.5)
    model.eval()  # type: ignore[no-untyped-call]
    return model
