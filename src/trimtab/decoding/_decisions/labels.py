"""Log-probabilities of many answers to one prompt: all of them as one draft tree, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab.core.errors import DataError
from trimtab.decoding._decisions.rules import Array
from trimtab.decoding._decoder import Decoder
from trimtab.decoding._distribution import Distribution
from trimtab.decoding._ledger import DecodingLedger
from trimtab.decoding._tree import ROOT, DraftTree

_LOGITS_PER_FORWARD = 1 << 25  # numbers; 128 MiB in float32


@dataclass(frozen=True)
class LabelTrie:
    """Token sequences that share their beginnings.

    tree    deterministic; a token that nothing follows is no node, since only what precedes it needs to be read
    steps   for each sequence and each of its tokens the node it follows (ROOT: the prompt) and the token
    """

    tree: DraftTree
    steps: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], names: Sequence[str]) -> LabelTrie:
        """Raises DataError for a sequence that is empty, the same as another or the beginning of one."""
        tree = DraftTree("deterministic")
        nodes: dict[tuple[int, ...], int] = {(): ROOT}
        owners = {tuple(own): name for own, name in zip(sequences, names, strict=True)}
        for own, name in zip(sequences, names, strict=True):
            if not own:
                raise DataError(f"the answer {name!r} holds no token.")
            if owners[tuple(own)] != name:
                raise DataError(f"the answers {name!r} and {owners[tuple(own)]!r} are the same tokens.")
            for length in range(1, len(own)):
                beginning = tuple(own[:length])
                if beginning in owners:
                    raise DataError(
                        f"the answer {owners[beginning]!r} is the beginning of {name!r}; give an `end` that tells "
                        "them apart."
                    )
                if beginning not in nodes:
                    parent = nodes[beginning[:-1]]
                    nodes[beginning] = tree.add(own[length - 1], parent, rank=len(tree.children(parent)))
        return cls(
            tree,
            tuple(tuple((nodes[tuple(own[:i])], token) for i, token in enumerate(own)) for own in sequences),
        )

    @property
    def depth(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.steps))


class Continuations:
    """Texts as tokens after a prompt.

    A text is encoded together with the prompt's last token, as it is when both are one text, or alone where that would
    change the prompt's token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self._tokenizer = tokenizer
        self._known: dict[int, list[list[int]]] = {}

    def after(self, prompt: Sequence[int]) -> list[list[int]]:
        """Tokens of each text, as they follow a prompt that ends like this one."""
        if (last := prompt[-1]) not in self._known:
            before = str(self._tokenizer.decode([last]))
            head = self._ids(before)
            joint = [self._ids(before + text) for text in self.texts]
            self._known[last] = [
                own[len(head) :] if own[: len(head)] == head else self._ids(text)
                for own, text in zip(joint, self.texts, strict=True)
            ]
        return self._known[last]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def log_probabilities(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    tries: Sequence[LabelTrie],
    distributions: Sequence[Distribution],
    spent: list[DecodingLedger],
) -> list[list[Array]]:
    """For each prompt and distribution: log p of each sequence of the prompt's trie, [n] float64, all tokens summed.

    A batch of prompts takes two forward passes, one for the prompts and one for the tries. Their costs join `spent`.
    """
    ledger = DecodingLedger()
    spent.append(ledger)
    early = sorted({layer for distribution in distributions for layer in distribution.exits})
    found: list[list[Array]] = []
    for start, stop in _batches(decoder, tries):
        reader = decoder.reader(stop - start, early)
        own = prompts[start:stop]
        trees = [trie.tree for trie in tries[start:stop]]
        ledger.note_prompts(own)
        with ledger.phase("prefill"):
            reader.prefill([prompt[:-1] for prompt in own])
        with ledger.phase("verify"):
            rows = reader.read(
                [[prompt[-1], *tree.tokens] for prompt, tree in zip(own, trees, strict=True)],
                [[ROOT, *(parent + 1 for parent in tree.parents)] for tree in trees],
            )
        ledger.target_forwards += 1
        ledger.rounds += len(own)
        ledger.nodes_scored += sum(1 + len(tree) for tree in trees)
        with ledger.phase("accept"):
            for prompt, trie, said in zip(own, tries[start:stop], rows, strict=True):
                prefix = _Prefixes(prompt, trie.tree)
                found.append([_totals(d.log_probs(said, prefix), trie) for d in distributions])
    return found


def _totals(log_probs: Tensor, trie: LabelTrie) -> Array:
    """log_probs [1 + N, V] after the prompt and each node -> [n] float64 of the sequences."""
    rows, tokens = zip(*(step for steps in trie.steps for step in steps), strict=True)
    each = log_probs[torch.tensor(rows) + 1, torch.tensor(tokens)].double().cpu().numpy()
    starts = np.cumsum([0, *map(len, trie.steps[:-1])])
    return np.asarray(np.add.reduceat(each, starts), dtype=np.float64)


class _Prefixes:
    """Row 0 follows the prompt, row i + 1 node i."""

    def __init__(self, prompt: Sequence[int], tree: DraftTree) -> None:
        self._prompt = prompt
        self._tree = tree

    def __call__(self, row: int) -> list[int]:
        return [*self._prompt, *(self._tree.tokens[node] for node in self._tree.path(row - 1))]


def _batches(decoder: Decoder, tries: Sequence[LabelTrie]) -> Iterator[tuple[int, int]]:
    """Ranges of prompts whose logits are not too many at once."""
    vocabulary = int(decoder.model.config.get_text_config().vocab_size)
    start = 0
    while start < len(tries):
        stop, widest = start, 0
        while stop < len(tries):
            widest = max(widest, 1 + len(tries[stop].tree))
            if stop > start and (stop + 1 - start) * widest * vocabulary > _LOGITS_PER_FORWARD:
                break
            stop += 1
        yield start, stop
        start = stop
