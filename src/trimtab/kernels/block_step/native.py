"""The C++ of native/block_step.cpp on CPU tensors, through ctypes, described to the library once.

Numbers are rounded to the dtype of the model wherever the reference rounds them. Sums inside are float32 and products
those of grid_matmul, sparse_matmul and gather_matmul, so a result may differ from the reference's by a unit in the last
place, and later ones by what that causes. Rows do not influence each other and neither does the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from trimtab.kernels import library
from trimtab.kernels.block_step.block import Block, Layer, LowRankTerm, Norm, SparseTerm
from trimtab.kernels.gather_matmul import native as gather_kernels
from trimtab.kernels.gather_matmul.prepared import refuses as refuses_gather
from trimtab.kernels.gather_matmul.weight import GatherWeight
from trimtab.kernels.grid_matmul import native
from trimtab.kernels.grid_matmul.weight import GridWeight
from trimtab.kernels.library import (
    DTYPES,
    BlockLinearStruct,
    BlockNormStruct,
    BlockStruct,
    BlockTermStruct,
    GridWeightStruct,
)
from trimtab.kernels.sparse_matmul import native as sparse_kernels
from trimtab.kernels.terms import native as term_kernels

MAX_ROWS = 8
"""Rows of x, batch times tokens: with more, products take so long that what stands between them no longer counts."""


def refuses(block: Block) -> str | None:
    """Why a block needs another way, or None. Raises ConfigError for a weight that is wrong in itself."""
    if reason := library.absent():
        return reason
    for name, tensor in block.tensors().items():
        if not tensor.is_cpu:
            return f"{name} is on {tensor.device}, native kernels read CPU memory"
        if not tensor.is_contiguous():
            return f"{name} of shape {list(tensor.shape)} is not contiguous"
    dtype = block.attention_norm.weight.dtype
    if dtype not in DTYPES:
        return f"norms are {dtype}; native kernels take float32, float16 and bfloat16"
    exact = {name: norm.weight for name, norm in block.norms().items()}
    exact |= {f"the bias of {name}": each.bias for name, each in block.layers().items() if each.bias is not None}
    for name, tensor in exact.items():
        if tensor.dtype != dtype:
            return f"{name} is {tensor.dtype}, attention_norm {dtype}"
    probe = torch.empty(1, 1, dtype=dtype)
    for name, layer in block.layers().items():
        weight = layer.weight
        if isinstance(weight, GridWeight):
            reason = native.refuses(probe, (weight,))
        elif isinstance(weight, GatherWeight):
            reason = refuses_gather(weight)
        else:
            reason = sparse_kernels.refuses(probe, (weight,))
        if reason:
            return f"{name}: {reason}"
    return block.misfit() or _refuses_term(block, dtype)


def _refuses_term(block: Block, dtype: torch.dtype) -> str | None:
    for name, layer in block.layers().items():
        x, out = torch.empty(1, layer.weight.in_features, dtype=dtype), torch.empty(1, 1, dtype=dtype)
        for term in layer.terms:
            if isinstance(term, LowRankTerm):
                reason = term_kernels.low_rank_refuses(out, x, term.left, term.right)
            else:
                reason = term_kernels.sparse_refuses(out, x, term.values, term.columns, term.offsets)
            if reason:
                return f"{name}: {reason}"
    return None


class PreparedBlock:
    """The two calls of a block that `refuses` has no objection to.

    Made of tensors that keep their memory: what exchanges one makes another, which `moved` shows.
    """

    def __init__(self, block: Block) -> None:
        self._tensors = list(block.tensors().values())
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        self.dtype = block.attention_norm.weight.dtype
        self.hidden = block.q.weight.in_features
        self.head_dim = block.head_dim
        self._heads = [layer.weight.out_features // block.head_dim for layer in (block.q, block.k, block.v)]
        self._width = sum(self._heads) * block.head_dim
        self._terms = {name: _terms(layer) for name, layer in block.layers().items()}
        layers = {name: _layer(layer, self._terms[name]) for name, layer in block.layers().items()}
        norms = {name: _norm(norm) for name, norm in block.norms().items()}
        described = BlockStruct(
            **layers, **norms, head_dim=block.head_dim, dtype=DTYPES[self.dtype], isa=library.isa_limit()
        )
        self._described = (BlockStruct * 1)(described)
        functions = library.native_library()
        self._before, self._after = functions.tt_block_before, functions.tt_block_after

    def moved(self) -> bool:
        """Whether a tensor has other memory than it had."""
        return [tensor.data_ptr() for tensor in self._tensors] != self._pointers

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        """x [R, T, hidden], cos and sin [R or 1, T, d] -> queries, keys and values [R, heads, T, d].

        All are contiguous and of `dtype`, with R * T at most MAX_ROWS: the caller has checked that.
        """
        rows, tokens, _ = x.shape
        out = torch.empty(rows * tokens * self._width, dtype=self.dtype)
        status = self._before(
            self._described,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[0] * tokens,
            out.data_ptr(),
            rows * tokens,
            torch.get_num_threads(),
        )
        library.check(status)
        results, start, size = [], 0, self.head_dim
        for heads in self._heads:
            step = heads * size
            results.append(out.as_strided((rows, heads, tokens, size), (tokens * step, size, step, 1), start))
            start += rows * tokens * step
        return results

    def after(self, attended: Tensor, x: Tensor) -> Tensor:
        """attended [R, T, query heads * d] and the block's input x [R, T, hidden], as for `before` -> its output."""
        out = torch.empty(x.shape, dtype=self.dtype)
        status = self._after(
            self._described,
            attended.data_ptr(),
            x.data_ptr(),
            out.data_ptr(),
            x.shape[0] * x.shape[1],
            torch.get_num_threads(),
        )
        library.check(status)
        return out


def _terms(layer: Layer) -> ctypes.Array[BlockTermStruct]:
    """Those that are not empty."""
    found = [term for term in layer.terms if all(tensor.numel() for tensor in term.tensors().values())]
    return (BlockTermStruct * len(found))(*map(_term, found))


def _term(term: LowRankTerm | SparseTerm) -> BlockTermStruct:
    if isinstance(term, LowRankTerm):
        left, right = term.left, term.right
        return BlockTermStruct(right.data_ptr(), left.data_ptr(), rank=right.shape[0], dtype=DTYPES[right.dtype])
    values, columns, offsets = (tensor.data_ptr() for tensor in term.tensors().values())
    return BlockTermStruct(values=values, columns=columns, offsets=offsets, dtype=DTYPES[term.values.dtype])


def _layer(layer: Layer, terms: ctypes.Array[BlockTermStruct]) -> BlockLinearStruct:
    weight, bias = layer.weight, None if layer.bias is None else layer.bias.data_ptr()
    described = BlockLinearStruct(terms=ctypes.addressof(terms), term_count=len(terms), bias=bias)
    if isinstance(weight, GridWeight):
        described.weight = native.describe(weight)
    else:
        described.weight = GridWeightStruct(weight.out_features, weight.in_features)
        if isinstance(weight, GatherWeight):
            described.gather = gather_kernels.describe(weight)
        else:
            described.sparse = sparse_kernels.describe(weight)
    return described


def _norm(norm: Norm) -> BlockNormStruct:
    return BlockNormStruct(norm.weight.data_ptr(), norm.epsilon)
