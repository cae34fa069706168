"""Speed of a model: reading a prompt (prefill) and writing one token after another (decode)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.errors import BudgetError, ConfigError
from trimtab.evaluation.client import inference

if TYPE_CHECKING:
    from trimtab.cache.base import CacheMethod


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over `repeats` after one warm-up, batch size 1 unless said otherwise; *_spread is (max - min) / median.

    decode_ms_median                  milliseconds per decoded token (of the whole batch)
    decode_tokens_per_second_median   tokens of all rows per second
    prefill_s_median                  seconds to read the prompt
    """

    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int
    threads: int
    device: str
    prefill_s_median: float
    prefill_tokens_per_second_median: float
    prefill_spread: float
    decode_ms_median: float
    decode_tokens_per_second_median: float
    decode_spread: float

    def to_dict(self) -> dict[str, float | int | str]:
        return asdict(self)


def measure_speed(
    model: PreTrainedModel,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch: int = 1,
    repeats: int = 5,
    cache: CacheMethod | None = None,
) -> Speed:
    """Time a forward pass over a random prompt, then `new_tokens` greedy steps with the key-value cache.

    Sampling, tokenizing and text are left out: this is the model alone. `cache`: keys and values are kept by this
    method instead of transformers' own cache. Raises BudgetError if prompt and new tokens do
    not fit the context, ConfigError for counts below one.
    """
    for name, value in (
        ("prompt_tokens", prompt_tokens),
        ("new_tokens", new_tokens),
        ("batch", batch),
        ("repeats", repeats),
    ):
        if value < 1:
            raise ConfigError(f"speed: {name} must be at least 1, but is {value}.")
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and prompt_tokens + new_tokens > context:
        raise BudgetError(
            f"speed: prompt_tokens={prompt_tokens} and new_tokens={new_tokens} exceed the model's context of {context}."
        )
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(int(config.vocab_size), (batch, prompt_tokens), generator=generator).to(model.device)
    prefill, decode = [], []
    if cache is not None:
        cache.new(model)  # may fit itself to the model, which may need gradients
    with inference(model):
        for repeat in range(repeats + 1):
            read, write = _once(model, prompt, new_tokens, cache)
            if repeat > 0:  # the first warms up: caches, kernels that are built or chosen on first use
                prefill.append(read)
                decode.append(write / new_tokens)
    read, step = statistics.median(prefill), statistics.median(decode)
    return Speed(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        repeats=repeats,
        threads=torch.get_num_threads(),
        device=str(model.device),
        prefill_s_median=read,
        prefill_tokens_per_second_median=batch * prompt_tokens / read,
        prefill_spread=(max(prefill) - min(prefill)) / read,
        decode_ms_median=1000 * step,
        decode_tokens_per_second_median=batch / step,
        decode_spread=(max(decode) - min(decode)) / step,
    )


def _once(model: PreTrainedModel, prompt: Tensor, new_tokens: int, cache: CacheMethod | None) -> tuple[float, float]:
    """Seconds to read the prompt, and to write the new tokens."""
    clock = _clock(prompt.device)
    start = clock()
    own = {} if cache is None else {"past_key_values": cache.new(model)}
    output = model(input_ids=prompt, use_cache=True, **own)
    token = output.logits[:, -1:].argmax(dim=-1)
    middle = clock()
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1)
    return middle - start, clock() - middle


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised
