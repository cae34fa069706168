"""What ships with a trained model: weights, tokenizer, loss curve, data manifest."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.core.files import atomic_directory, sha256_file, write_text_atomically
from trimtab.training.reference.texts import HELD_OUT

TEXTS = Path(__file__).parents[2] / "assets" / "text"


def publish(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, run: Path, books: Path) -> None:
    """Write ``run/model``: the model in bfloat16 as a Hugging Face directory with its papers."""
    with atomic_directory(run / "model", force=True) as out:
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.to(torch.bfloat16).save_pretrained(out)  # type: ignore[arg-type]
        tokenizer.save_pretrained(out)
        write_curve(run / "log.jsonl", out)
        write_text_atomically(out / "data_manifest.json", json.dumps(manifest(books), indent=1) + "\n")


def manifest(books: Path) -> dict[str, list[dict[str, object]]]:
    """Name, size and hash of every book, with its split, and of the shipped texts cut from them."""
    split = {True: "held out", False: "train"}
    return {
        "books": [{**_entry(book), "split": split[book.stem in HELD_OUT]} for book in sorted(books.glob("*.txt"))],
        "shipped_texts": [_entry(text) for text in sorted(TEXTS.glob("*.txt"))],
    }


def _entry(file: Path) -> dict[str, object]:
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256_file(file)}


def write_curve(log: Path, out: Path) -> None:
    """``loss_curve.json`` and ``loss_curve.png`` from the log of a run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    write_text_atomically(out / "loss_curve.json", json.dumps(lines).replace("}, ", "},\n ") + "\n")
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for stage in dict.fromkeys(line["stage"] for line in lines):
        points = [(line["tokens"] / 1e6, line["loss"]) for line in lines if line["stage"] == stage]
        axes.plot(*zip(*points, strict=True), label=stage, linewidth=0.8)
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("weighted training loss (nats per token)")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(out / "loss_curve.png", dpi=110)
    pyplot.close(figure)
