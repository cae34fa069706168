"""`trimtab generate MODEL -p "..."`: the model continues a text, shown as it is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.app.cli.options import (
    AsJson,
    Cache,
    CacheSettings,
    Decoding,
    DecodingSettings,
    Device,
    Model,
    Seed,
    read_cache,
    read_decoding,
)
from trimtab.app.cli.output import emit_json, show, wide_table
from trimtab.core.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.cache.base import CacheMethod
    from trimtab.decoding.base import DecodingMethod

EXAMPLES = (
    'trimtab generate ref -p "The old house by the river"',
    'trimtab generate ref-gptq4 -p "She said" --max-new-tokens 80 --temperature 0.8 --seed 3',
    'trimtab generate ref -p "Once upon a time" --cache kivi --cache-set bits=2',
    'trimtab generate ref -p "Once upon a time" --decoding speculative --decoding-set draft=ref-mini,depth=4',
)


def encode_prompt(model: Any, prompt: str, max_new_tokens: int, *, endless: bool = False) -> Any:
    """Token ids [1, length]. Raises DataError if there is none, or if prompt and new tokens exceed the context.

    endless   the cache has positions of its own: only the prompt has to fit
    """
    from trimtab.models import tokenizer_of

    ids = tokenizer_of(model)(prompt, return_tensors="pt")["input_ids"]
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if ids.shape[1] == 0:
        raise DataError("the prompt holds no token. Give a text with -p.")
    if window is not None and ids.shape[1] + (0 if endless else max_new_tokens) > window:
        raise DataError(
            f"the prompt ({ids.shape[1]} tokens) and --max-new-tokens {max_new_tokens} exceed the model's {window} "
            "positions."
        )
    return ids


def continue_tokens(
    model: Any, ids: Any, *, max_new_tokens: int, temperature: float, seed: int, streamer: Any = None, cache: Any = None
) -> tuple[str, int]:
    """The continuation of token ids [1, length] as text, and the number of its tokens. Temperature 0 is greedy.

    cache   an empty cache that keys and values are kept in, instead of transformers' own
    """
    import torch

    from trimtab.models import tokenizer_of

    tokenizer = tokenizer_of(model)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    ids = ids.to(model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            past_key_values=cache,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    new = output[0, ids.shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)), int(new.shape[0])


def run(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    cache: Cache = None,
    cache_settings: CacheSettings = None,
    decoding: Decoding = None,
    decoding_settings: DecodingSettings = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text and show it while it is written."""
    if not prompt.strip():
        raise DataError("the prompt is empty. Give a text with -p.")
    method = read_cache(cache, cache_settings)
    methods = read_decoding(decoding, decoding_settings)
    import time

    from transformers import TextStreamer

    import trimtab as tt
    from trimtab.models import tokenizer_of

    loaded = tt.load(model, device=device)

    if methods:
        told = _decode(loaded, prompt, methods, method, max_new_tokens, temperature, seed, quiet=as_json)
        if as_json:
            emit_json({"model": model, "prompt": prompt, **told, "seed": seed})
        return
    kept = None if method is None else method.new(loaded)
    endless = kept is not None and kept.positions is None
    ids = encode_prompt(loaded, prompt, max_new_tokens, endless=endless)
    streamer = None
    if not as_json:
        typer.echo(prompt, nl=False)
        streamer = TextStreamer(tokenizer_of(loaded), skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    text, count = continue_tokens(
        loaded, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, streamer=streamer, cache=kept
    )
    if as_json:
        seconds = time.perf_counter() - start
        told = {"model": model, "prompt": prompt, "text": text, "tokens": count, "seconds": seconds, "seed": seed}
        if method is not None and kept is not None:
            told["cache"] = {"method": type(method).name(), **method.to_dict(), "bytes": kept.nbytes()}
        emit_json(told)


def _decode(
    model: Any,
    prompt: str,
    methods: Sequence[DecodingMethod],
    cache: CacheMethod | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Continue with methods of the decoding room, shown as it is written; what --json tells of it."""
    import time

    import torch
    from transformers import TextStreamer

    from trimtab.decoding import Decoder, Sampling
    from trimtab.models import tokenizer_of

    stops = model.generation_config.eos_token_id
    sampling = Sampling(
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop_tokens=() if stops is None else tuple(torch.as_tensor(stops).flatten().tolist()),
    )
    decoder = Decoder(model, methods, new_cache=None if cache is None else cache.new)
    ids = tokenizer_of(model)(prompt)["input_ids"]
    streamer: Any = None
    if not quiet:
        typer.echo(prompt, nl=False)
        streamer = TextStreamer(tokenizer_of(model), skip_special_tokens=True)
    start = time.perf_counter()
    done = decoder.generate(
        [ids], sampling, on_tokens=None if streamer is None else lambda _, new: streamer.put(torch.tensor(new))
    )
    seconds = time.perf_counter() - start
    ledger = done.ledger.to_dict()
    if streamer is not None:
        streamer.end()
        show(*ledger_table(ledger, seconds))
    return {
        "text": decoder.decode(done.tokens[0]),
        "tokens": len(done.tokens[0]),
        "finish": done.finishes[0],
        "seconds": seconds,
        "decoding": [{"method": type(m).name(), **m.to_dict()} for m in methods],
        "ledger": ledger,
    }


def ledger_table(ledger: dict[str, Any], seconds: float) -> list[Table]:
    """The terminal's form of a DecodingLedger."""
    rows = [
        ("tokens", f"{ledger['committed']} in {seconds:.2f} s, {ledger['committed'] / seconds:.1f} per second"),
        ("target forward passes", f"{ledger['target_forwards']} ({ledger['plain_rounds']} rounds without a draft)"),
        ("tokens per target forward pass", f"{ledger['tokens_per_target_forward']:.2f}"),
        ("draft forward passes", str(ledger["draft_forwards"])),
        ("nodes scored", str(ledger["nodes_scored"])),
        ("drafted by depth", " ".join(map(str, ledger["drafted_by_depth"])) or "none"),
        ("accepted by depth", " ".join(map(str, ledger["accepted_by_depth"])) or "none"),
        ("accepted by rank", " ".join(map(str, ledger["accepted_by_rank"])) or "none"),
        ("seconds", ", ".join(f"{phase} {taken:.2f}" for phase, taken in ledger["seconds"].items())),
    ]
    return wide_table("what it cost", ("figure", "value"), rows)
