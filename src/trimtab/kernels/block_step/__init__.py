"""A transformer block of Llama's form while decoding, with packed weights, in two calls around its attention.

For a few rows the products read memory as fast as it goes; norms, rotary embedding, activation and sums, each a call of
its own, take half as long again. There is no dispatch: `models/fast_block` uses it where `refuses` has no objection,
and the modules themselves elsewhere.
"""

from trimtab.kernels.block_step.block import Block, Layer, LowRankTerm, Norm, SparseTerm
from trimtab.kernels.block_step.native import MAX_ROWS, PreparedBlock, refuses
from trimtab.kernels.block_step.reference import after_reference, before_reference

__all__ = [
    "MAX_ROWS",
    "Block",
    "Layer",
    "LowRankTerm",
    "Norm",
    "PreparedBlock",
    "SparseTerm",
    "after_reference",
    "before_reference",
    "refuses",
]
