"""A byte-level BPE tokenizer of Hugging Face `tokenizers` as the fields that llama.cpp reads.

llama.cpp does not read how text is split before BPE; it knows splitters by name. The name is found by comparing the
tokenizer's own splitter with those of the families that the names belong to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.core.errors import ConfigError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""Token types of llama.cpp."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN_2 = rf"{_WORDS}|\p{{N}}|{_REST}"
_SPLITTERS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "starcoder",
    (("Split", _LLAMA_3), ("ByteLevel", False)): "llama-bpe",
    (("Split", _QWEN_2), ("ByteLevel", False)): "qwen2",
}
"""Steps of a Hugging Face pre-tokenizer -> llama.cpp's name of the same splitting."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Fields of `tokenizer.ggml`; `special` maps "bos", "eos", "unk", "pad" to token ids."""

    splitter: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary, filled up to the model's `size` with unused tokens.

    Raises ConfigError for a tokenizer that llama.cpp would read as another one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("it is not of the library tokenizers")
    data: dict[str, Any] = json.loads(backend.to_str())
    model = data["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or data.get("normalizer") not in (None, _NFC):
        raise _refused(f"it is no byte-level BPE (model {model.get('type')}, normalizer {data.get('normalizer')})")
    by_id = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(by_id, _NORMAL)
    for added in data["added_tokens"]:
        by_id[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if max(by_id) >= size:
        raise _refused(f"it has token {max(by_id)}, and the model has {size} tokens")
    sample = tokenizer("a")["input_ids"]
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "unk", "pad")}
    template = tokenizer.chat_template
    return Vocabulary(
        splitter=_splitter(data.get("pre_tokenizer")),
        tokens=[by_id.get(index, f"[PAD{index}]") for index in range(size)],
        types=[types.get(index, _UNUSED) for index in range(size)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        special={kind: int(index) for kind, index in ids.items() if index is not None},
        adds_bos=ids["bos"] is not None and sample[0] == ids["bos"],
        adds_eos=ids["eos"] is not None and sample[-1] == ids["eos"],
        chat_template=template if isinstance(template, str) else None,
    )


_NFC = {"type": "NFC"}
"""Qwen's normalizer, which llama.cpp leaves out: it matters for text that is not composed."""


def _splitter(pre_tokenizer: dict[str, Any] | None) -> str:
    if pre_tokenizer is None:
        raise _refused("it does not split text")
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    found = tuple(_step(step) for step in steps)
    if found not in _SPLITTERS:
        raise _refused(f"it splits text by {list(found)}, which is none of {', '.join(_SPLITTERS.values())}")
    return _SPLITTERS[found]


def _step(step: dict[str, Any]) -> tuple[str, Any]:
    kind = str(step["type"])
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step["use_regex"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return kind, step["pattern"].get("Regex")
    return kind, "other settings"


def _refused(reason: str) -> ConfigError:
    return ConfigError(
        f"gguf: llama.cpp would not read this tokenizer as it is: {reason}. With tokenizer=none the file holds no "
        "tokenizer, and llama.cpp takes token ids."
    )
