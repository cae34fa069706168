"""Drafts from the text itself: what followed the last tokens when they came before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from trimtab.decoding._proposers.base import Proposer
from trimtab.decoding._tree import ROOT, DraftTree, Law


class NgramLookup(Proposer):
    """A chain of up to `depth` tokens: those after the latest place where the longest end of the text, of at most
    `longest` tokens, occurs. No draft where its last token has never been before (Saxena 2023, prompt look-up)."""

    law: ClassVar[Law] = "deterministic"

    def __init__(self, depth: int, longest: int) -> None:
        self.depth = depth
        self._longest = longest

    def propose(
        self, texts: Sequence[Sequence[int]], limits: Sequence[int], generators: Sequence[torch.Generator]
    ) -> list[DraftTree]:
        trees = []
        for text, limit in zip(texts, limits, strict=True):
            tree, node = DraftTree(self.law), ROOT
            begin = self._found(text)
            for token in text[begin : begin + min(self.depth, limit)]:
                node = tree.add(token, node)
            trees.append(tree)
        return trees

    def _found(self, text: Sequence[int]) -> int:
        """Where the continuation begins; the text's end if there is none."""
        best, begin = 0, len(text)
        for end in range(len(text) - 1, 0, -1):
            if text[end - 1] != text[-1]:
                continue
            length = 1
            while length < min(self._longest, end) and text[end - 1 - length] == text[-1 - length]:
                length += 1
            if length > best:
                best, begin = length, end
            if best == self._longest:
                break
        return begin
