"""The text that statistics are gathered on, as token sequences of equal length."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.core.errors import DataError
from trimtab.core.files import read_user_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEQUENCES = 128
LONGEST = 2048
_CHARACTERS_PER_TOKEN = 16  # far more than any tokenizer packs on average: how much of a large text is read


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token sequences for calibration.

    tokens    [sequences, length] int64
    mask      [sequences, length] bool; False at padding, which enters no statistic
    source    where the text is from, for the run record
    sha256    hex digest of tokens and mask, which a resumed run is checked by
    """

    tokens: Tensor
    mask: Tensor
    source: str
    sha256: str

    @property
    def length(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def count(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())

    @classmethod
    def from_tokens(cls, tokens: Tensor, mask: Tensor | None = None, source: str = "tokens") -> CalibrationSet:
        """From tokens [sequences, length] and a mask of the same shape (None: no padding; pad on the right).

        Raises DataError if there are no tokens, or all are padding, or the shapes differ.
        """
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise DataError(
                f"calibration tokens must be integers [sequences, length], not {tokens.dtype} {list(tokens.shape)}."
            )
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        if mask.shape != tokens.shape:
            raise DataError(f"a mask of shape {list(mask.shape)} does not fit calibration tokens {list(tokens.shape)}.")
        if not bool(mask.any()):
            raise DataError(f"calibration tokens of shape {list(tokens.shape)} hold no token that is not padding.")
        tokens, mask = tokens.to("cpu", torch.int64).contiguous(), mask.cpu().contiguous()
        digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
        digest.update(tokens.numpy().tobytes())
        digest.update(mask.numpy().tobytes())
        return cls(tokens, mask, source, digest.hexdigest())

    @classmethod
    def from_text(
        cls,
        text_or_path: str | Path | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sequences: int = SEQUENCES,
        length: int | None = None,
        context: int | None = None,
        seed: int = 0,
    ) -> CalibrationSet:
        """Cut a text into windows of `length` tokens and take `sequences` of them at random, in the order of the text.

        text_or_path    a file, or the text itself; None: the prose that comes with trimtab. A string that is the name
                        of a file is read as that file
        length          tokens per sequence; None: 2048, or `context` or the tokenizer's limit if that is less
        context         the longest sequence the model takes

        Windows do not overlap; a text with fewer than `sequences` windows gives as many as it has (at least one). Of a
        text much longer than needed only a span at a random place is read. If the tokenizer begins its sequences with a
        special token, so does every window. Raises DataError if the text is empty or not UTF-8, or too short for one
        sequence.
        """
        text, source = _read(text_or_path)
        limit = min(LONGEST, context or LONGEST, tokenizer.model_max_length or LONGEST)
        length = limit if length is None else length
        if sequences < 1 or length < 2:
            raise DataError(f"calibration needs at least 1 sequence of 2 tokens, not {sequences} of {length}.")
        generator = torch.Generator().manual_seed(seed)
        wanted = sequences * length * _CHARACTERS_PER_TOKEN
        if len(text) > wanted:
            start = int(torch.randint(len(text) - wanted + 1, (), generator=generator))
            text = text[start : start + wanted]
        begin = _begin_token(tokenizer)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
        body = length - len(begin)
        windows = len(ids) // body
        if windows < 1:
            raise DataError(
                f"calibration text {source} has {len(ids)} tokens, fewer than one sequence of {length}. "
                "Give a longer text or a smaller length."
            )
        phase = int(torch.randint(len(ids) - windows * body + 1, (), generator=generator))
        chosen = torch.randperm(windows, generator=generator)[:sequences].sort().values
        rows = ids[phase : phase + windows * body].view(windows, body)[chosen]
        prefix = torch.tensor(begin, dtype=torch.int64).expand(len(rows), -1)
        return cls.from_tokens(torch.cat([prefix, rows], dim=1), source=source)

    def split(self, share: float) -> tuple[Tensor, Tensor]:
        """Indices of the sequences to learn from and, from the end of the text, of about `share` of all to choose by.

        Raises DataError for a single sequence, of which neither could be left out.
        """
        count = len(self.tokens)
        if count < 2:
            raise DataError(
                f"tuning needs at least 2 calibration sequences, one to train on and one to choose by; "
                f"{self.source} gives {count}. Use a longer text, or shorter sequences."
            )
        held = min(count - 1, max(1, round(share * count)))
        order = torch.arange(count)
        return order[:-held], order[-held:]

    def take(self, sequences: Tensor) -> CalibrationSet:
        """These sequences alone."""
        return self.from_tokens(self.tokens[sequences], self.mask[sequences], self.source)


def _read(text_or_path: str | Path | None) -> tuple[str, str]:
    """The text and what to call it."""
    if text_or_path is None:
        shipped = resources.files("trimtab") / "assets" / "text" / "prose_calibration.txt"
        return shipped.read_text(encoding="utf-8"), "prose_calibration.txt"
    if isinstance(text_or_path, str) and ("\n" in text_or_path or not _is_file(text_or_path)):
        if not text_or_path.strip():
            raise DataError("the calibration text is empty.")
        return text_or_path, f"{text_or_path[:30]!r}..." if len(text_or_path) > 30 else repr(text_or_path)
    return read_user_text(text_or_path), str(text_or_path)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long for a name: a text
        return False


def _begin_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of a sequence: its begin token, or nothing."""
    begin = tokenizer.bos_token_id
    first = tokenizer("a")["input_ids"][:1]
    return [int(begin)] if begin is not None and first == [begin] else []
