"""Reading a given text through a KV cache, so that what the cache loses is seen.

A prompt attends to its own exact keys and values, so one forward pass over a text shows nothing of a cache's error,
which only meets later steps. Here a text is fed in chunks: each token attends to what the cache has kept of the chunks
before, and to its own chunk exactly. Chunks of one token are generation; 64 cost about as much as a forward pass, and
encode the same tokens in the same blocks where the chunk divides the method's block. The first chunk is a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from trimtab.models.segments import SegmentCache

CHUNK = 64


def chunked_logits(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], cache: SegmentCache, *, chunk: int = CHUNK
) -> Iterator[tuple[int, Tensor]]:
    """Logits of the token after each token of each row, chunk by chunk.

    rows    token ids, longest row first; a row that has ended leaves the batch, and the cache
    cache   a new one of this model; afterwards it holds the rows that were in the last chunk
    chunk   tokens per forward pass

    Yields (position of the chunk's first token, logits [rows still read, tokens of the chunk, vocabulary]); beyond the
    end of a row they mean nothing. Raises DataError for rows that are empty or not ordered.
    """
    if chunk < 1:
        raise ConfigError(f"a text is read in chunks of at least 1 token, not {chunk}.")
    lengths = [len(row) for row in rows]
    if not rows or min(lengths) < 1 or lengths != sorted(lengths, reverse=True):
        raise DataError(f"rows to be read through a cache must hold tokens and come longest first, not {lengths}.")
    active = len(rows)
    for begin in range(0, lengths[0], chunk):
        reading = sum(length > begin for length in lengths)
        if reading < active:
            cache.reorder(range(reading))
            active = reading
        end = min(begin + chunk, lengths[0])
        # Past its end a row repeats its last token: nothing before sees it, and the row is dropped.
        ids = [[row[min(at, len(row) - 1)] for at in range(begin, end)] for row in rows[:active]]
        output = model(input_ids=torch.tensor(ids, device=model.device), past_key_values=cache, use_cache=True)
        yield begin, output.logits
