"""Decoding methods as a `custom_generate` of transformers.

generate() hands over logits processors and stopping criteria that it made of its settings. Temperature, top-k, top-p,
min-p and repetition penalty become `Sampling`, stop tokens, stop strings and the length likewise. Any other processor
runs as a transform, once for each drafted prefix; any other criterion is refused, because it may look at what an
accepted draft skips.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from trimtab.core.errors import CompositionError
from trimtab.decoding._decoder import Decoder, NewCache
from trimtab.decoding._distribution import Prefixes
from trimtab.decoding._reader import Rows
from trimtab.decoding._sampling import Sampling
from trimtab.decoding.base import DecodingMethod
from trimtab.models.early_exits import Exit
from trimtab.models.segments import SegmentCache

_OWN_PROCESSORS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
)
_OWN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)
_SEEDS = 2**31


class Processors:
    """Logits processors of transformers as a transform: each row with its own prefix, drafted tokens included."""

    exits: tuple[Exit, ...] = ()

    def __init__(self, processors: LogitsProcessorList) -> None:
        self._processors = processors

    def __call__(self, logits: Tensor, rows: Rows, prefixes: Prefixes) -> Tensor:
        found = []
        for row, own in enumerate(logits):
            prefix = torch.tensor([list(prefixes(row))], dtype=torch.long, device=logits.device)
            found.append(self._processors(prefix, own[None].clone()))  # type: ignore[arg-type]
        return torch.cat(found)


def custom_generate(
    methods: Sequence[DecodingMethod],
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    **_: Any,
) -> Tensor:
    """Token ids [R, length]: prompts as given, what was written, padding after the end of shorter texts.

    Chance comes from torch's global generator, as in generate(); see `Decoder` on drafts and seeds. A cache of the
    cache room, still empty, is what the model decodes with. generate() keeps a streamer to itself;
    `Decoder.generate(on_tokens=...)` shows texts as they grow.

    Raises CompositionError for stopping criteria of one's own, several sequences per prompt, a cache that holds
    tokens, and outputs other than tokens.
    """
    other = [type(c).__name__ for c in stopping_criteria if not isinstance(c, _OWN_CRITERIA)]
    if other:
        raise CompositionError(f"stopping criteria {', '.join(other)} cannot see inside a draft; use stop strings.")
    for name in ("num_return_sequences", "num_beams"):
        if (asked := getattr(generation_config, name, None)) not in (None, 1):
            raise CompositionError(f"{name}={asked} does not go with a decoding method of trimtab; repeat the prompts.")
    if generation_config.return_dict_in_generate:
        raise CompositionError("return_dict_in_generate: a decoding method of trimtab returns tokens alone.")
    sampling = _sampling(generation_config, input_ids.shape[1])
    processors = [p for p in logits_processor if not isinstance(p, _OWN_PROCESSORS)]
    before = [Processors(LogitsProcessorList(processors))] if processors else ()
    decoder = Decoder(model, methods, new_cache=_given(past_key_values), before=before)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts = [ids[seen.bool()].tolist() for ids, seen in zip(input_ids, mask, strict=True)]
    written = decoder.generate(prompts, sampling).tokens
    width = max(map(len, written))
    pad = generation_config.pad_token_id
    padding = pad if isinstance(pad, int) else sampling.stop_tokens[0] if sampling.stop_tokens else 0
    new = torch.full((len(written), width), padding, dtype=torch.long)
    for row, tokens in enumerate(written):
        new[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    return torch.cat([input_ids, new.to(input_ids.device)], dim=1)


def _given(cache: Cache | None) -> NewCache | None:
    """The cache that generate() was called with; None for the empty one that it makes by itself."""
    if not isinstance(cache, SegmentCache) and (cache is None or not cache.get_seq_length()):
        return None

    def given(model: PreTrainedModel) -> SegmentCache:
        assert cache is not None
        if not isinstance(cache, SegmentCache) or cache.get_seq_length():
            raise CompositionError(
                f"the {type(cache).__name__} holds {cache.get_seq_length()} tokens; a decoding method begins with an "
                "empty one, and those that read several times need Decoder(model, methods, new_cache=...)."
            )
        return cache

    return given


def _sampling(config: GenerationConfig, prompt: int) -> Sampling:
    stops = config.eos_token_id
    strings = config.stop_strings
    sampled: dict[str, Any] = {"temperature": 0.0}
    if config.do_sample:
        names = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        sampled = {name: usual if (v := getattr(config, name)) is None else v for name, usual in names.items()}
        sampled["seed"] = int(torch.randint(_SEEDS, ()))
    return Sampling(
        **sampled,
        repetition_penalty=config.repetition_penalty or 1.0,
        max_new_tokens=config.max_length - prompt,
        stop_tokens=() if stops is None else tuple(torch.as_tensor(stops).flatten().tolist()),
        stop_strings=() if strings is None else (strings,) if isinstance(strings, str) else tuple(strings),
    )
