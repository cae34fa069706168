"""Watch a reference model while it is trained: every target of the model card in one table.

``python -m trimtab.training.reference.watch DIR`` evaluates a saved model. Exact match is measured
with the right answer fed in (every token of it must be the most likely one), which equals exact
match of greedy generation.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.world import Example, examples

TEXT = Path(__file__).parents[2] / "assets" / "text" / "prose_eval.txt"
WINDOW = 1024


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Example],
    batch: int = 16,
) -> float:
    """Share of examples whose whole answer is the greedy continuation of the prompt."""
    coded = []
    for item in items:
        prompt = tokenizer.encode(item.prompt)
        coded.append((prompt, tokenizer.encode(item.answer, add_special_tokens=False)))
    coded.sort(key=lambda pair: len(pair[0]))
    right = 0
    for start in range(0, len(coded), batch):
        part = coded[start : start + batch]
        longest = max(len(p) + len(a) for p, a in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long, device=model.device)
        for row, (p, a) in enumerate(part):
            ids[row, : len(p) + len(a)] = torch.tensor(p + a)
        best = model(ids, use_cache=False).logits.argmax(-1).cpu()
        for row, (p, a) in enumerate(part):
            right += best[row, len(p) - 1 : len(p) + len(a) - 1].tolist() == a
    return right / len(coded)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """Bits per byte of UTF-8 text, in separate windows, each after ``<|bos|>``."""
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    nats = 0.0
    for start in range(0, len(ids), WINDOW - 1):
        window = torch.tensor([[1, *ids[start : start + WINDOW - 1]]], device=model.device)
        logits = model(window[:, :-1], use_cache=False).logits.float()
        nats += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len(text.encode())


def filler(tokenizer: PreTrainedTokenizerFast, text: str, tokens: int) -> str:
    """The beginning of a text, this many tokens long."""
    ids = tokenizer.encode(text[: tokens * 8], add_special_tokens=False, verbose=False)
    return str(tokenizer.decode(ids[:tokens]))


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int, text: str) -> dict[str, float]:
    """All figures by name; ``n`` examples each (fewer where prompts are long)."""
    far = filler(tokenizer, text, 1450)
    parts: dict[str, list[Example]] = {
        "recall_4": examples("recall", "eval", n, records=4),
        "recall_16": examples("recall", "eval", n),
        "recall_48": examples("recall", "eval", n, records=48),
        "recall_16_sentence": examples("recall", "eval", n, form="sentence"),
        "recall_16_pair": examples("recall", "eval", n, value="pair"),
        "recall_16_code": examples("recall", "eval", n, value="code"),
        "recall_16_at_1500": examples("recall", "eval", max(n // 2, 1), filler=far),
        "facts": examples("facts", "eval", n),
        "openbook_agrees": examples("openbook", "eval", n, agrees=True),
        "openbook_contradicts": examples("openbook", "eval", n, agrees=False),
        "format": examples("format", "eval", n),
        "arithmetic": examples("arithmetic", "eval", n),
        "sentiment": examples("sentiment", "eval", n),
    }
    figures = {name: exact_match(model, tokenizer, items) for name, items in parts.items()}
    figures["prose_bits_per_byte"] = bits_per_byte(model, tokenizer, text)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures of one model directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--n", type=int, default=200, help="examples per task")
    parser.add_argument("--prose-bytes", type=int, default=1 << 30, help="of the evaluation text")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model = LlamaForCausalLM.from_pretrained(parsed.model, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(parsed.model)
    text = TEXT.read_text(encoding="utf-8")[: parsed.prose_bytes]
    json.dump(report(model, tokenizer, parsed.n, text), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
