"""The byte ledger of a model, counted from the tensors it holds."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.core.ledger import Ledger, LedgerEntry
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.info import info_of, stored_tensors
from trimtab.models.views import LinearView, ModelView
from trimtab.tensors.sparse_inputs import SparseInputs


def ledger_of(model: PreTrainedModel) -> Ledger:
    """Count what the model stores, holds, reads and computes; see `Ledger` for the units.

    bytes_at_rest is the tensor bytes of the safetensors files that `save` writes. bytes_read_per_token takes one row of
    the token and position embeddings, and the whole token embedding where the head is tied to it. kv_bytes_per_token
    assumes a cache in the model's dtype and no window: layers with a sliding window stop growing once it is full.
    macs_per_token counts a compressed layer as the dense one it replaced. A layer that reads what its input asks for
    (`tensors/sparse_inputs.py`) counts with its bytes and operations for an average token, as it was calibrated.
    Raises TargetError for an unknown family.
    """
    view = ModelView.of(model)
    stored = stored_tensors(model)
    at_rest = _nbytes(stored.values())
    working = [b for b in model.buffers() if not any(b is t for t in stored.values())]
    compressed = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    return Ledger(
        bytes_at_rest=at_rest,
        resident_bytes=at_rest + _nbytes(working),
        bytes_read_per_token=at_rest + _nbytes(working) - _unread_embedding_bytes(view) - _unread_bytes(compressed),
        kv_bytes_per_token=sum(
            b.attention.num_kv_heads * (b.attention.head_dim + b.attention.value_dim) for b in view.blocks
        )
        * model.dtype.itemsize,
        macs_per_token=sum(map(_macs, view.linears)) + _weight(view.lm_head).numel(),
        baseline_bytes=info_of(model).baseline_bytes,
        compressed_weights=sum(m.out_features * m.in_features for m in compressed),
        compressed_bytes=sum(m.tensor.nbytes for m in compressed),
        entries=tuple(_entry(name, tensor) for name, tensor in stored.items()),
    )


def _unread_bytes(layers: Iterable[CompressedLinear]) -> int:
    """What layers hold and an average token does not read."""
    return sum(part.nbytes - part.read_bytes for layer in layers for part in layer.tensor.parts)


def _macs(linear: LinearView) -> int:
    dense = linear.out_features * linear.in_features
    if linear.compressed is None:
        return dense
    first, *_ = linear.compressed.tensor.parts
    return first.macs if isinstance(first, SparseInputs) else dense


def _unread_embedding_bytes(view: ModelView) -> int:
    tables = [] if view.tied_head else [_weight(view.embedding)]
    if view.positions is not None:
        tables.append(_weight(view.positions))
    return sum(_nbytes([table]) - _nbytes([table[0]]) for table in tables)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _entry(name: str, tensor: Tensor) -> LedgerEntry:
    module, _, role = name.rpartition(".")
    return LedgerEntry(module, role.partition("_")[2] if role.startswith("part") else role, _nbytes([tensor]))
