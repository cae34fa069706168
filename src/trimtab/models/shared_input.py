"""Compressed layers while decoding: few rows, no gradient, the same weights for every token.

Then the products are short, and what is found out anew for every call costs as much as they do. Here it is found out
once: a layer keeps a prepared product, and layers that read the same input (q, k and v; gate and up) share one native
call (`fast_decoding`). Results are the same to the bit.

compressed_linear.py imports this while transformers is being imported: nothing here may need its models.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from trimtab.kernels.gather_matmul.prepared import prepared_gather
from trimtab.kernels.grid_matmul.prepared import prepared_grids
from trimtab.kernels.prepared import PreparedProducts
from trimtab.kernels.sparse_matmul.prepared import prepared_sparse

if TYPE_CHECKING:
    from trimtab.models.compressed_linear import CompressedLinear


class PreparedFirst:
    """The first parts of layers that read one input, prepared together.

    It holds the layers' buffers as they were, and is stale once a layer has others or none.
    """

    def __init__(self, layers: Sequence[CompressedLinear]) -> None:
        parts = [layer.tensor.parts[0] for layer in layers]
        grids = [grid for part in parts if (grid := part.grid_weight()) is not None]
        sparse = [weight for part in parts if (weight := part.sparse_weight()) is not None]
        gathers = [gather for part in parts if (gather := part.gather_weight()) is not None]
        self.product: PreparedProducts | None = None
        if all(layer.tensor.transform is None for layer in layers):
            if len(grids) == len(layers):
                self.product = prepared_grids(grids)
            elif len(sparse) == len(layers):
                self.product = prepared_sparse(sparse)
            elif len(gathers) == len(layers):
                self.product = prepared_gather(gathers)
        self._kept = [[(layer._buffers, *named) for named in layer.stored().items()] for layer in layers]
        self._ids = [[id(tensor) for _, _, tensor in kept] for kept in self._kept]

    def fresh(self) -> bool:
        """Whether every layer still has the buffers that this was made of."""
        return [self._found(place) for place in range(len(self._kept))] == self._ids

    def has_kept(self, place: int) -> bool:
        """Whether one of the layers has."""
        return self._found(place) == self._ids[place]

    def _found(self, place: int) -> list[int]:
        return [id(buffers.get(name)) for buffers, name, _ in self._kept[place]]

    def versions(self, place: int) -> list[int]:
        """Where a layer's buffers are, and counts of what was written into them in place. Raises RuntimeError for those
        that do not count: tensors made in inference mode."""
        return [number for _, _, tensor in self._kept[place] for number in (tensor.data_ptr(), tensor._version)]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Products that were made with the first layer's, of this input and these versions of each layer's buffers."""

    prepared: PreparedFirst
    key: tuple[object, ...]
    versions: list[list[int]]
    products: dict[int, Tensor]


class SharedInput:
    """Layers that read one input. The first computes the products of all, and the others take theirs.

    An input is the same if its bytes are, so nothing that happens to a tensor between two calls goes unnoticed. A
    product is taken once, and counts only while no buffer of its layer has changed.
    """

    def __init__(self, layers: Sequence[CompressedLinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._prepared: PreparedFirst | None = None
        self._waiting: _Waiting | None = None  # replaced as one: threads cannot mix what they left

    def place(self, layer: CompressedLinear) -> int:
        """Of a layer in the order of the computation."""
        return next(place for place, known in enumerate(self._layers) if known() is layer)

    def product(self, place: int, x: Tensor) -> Tensor | None:
        """Of the layer at this place; None where it has to compute alone."""
        return self._taken(place, x) if place else self._computed(x)

    def _taken(self, place: int, x: Tensor) -> Tensor | None:
        waiting = self._waiting
        if waiting is None or (product := waiting.products.pop(place, None)) is None:
            return None
        if type(x) is not Tensor or not x.is_cpu or not x.is_contiguous() or _key(x) != waiting.key:
            return None
        kept = waiting.prepared.has_kept(place) and waiting.prepared.versions(place) == waiting.versions[place]
        return product if kept else None

    def _computed(self, x: Tensor) -> Tensor | None:
        prepared = self._current()
        if prepared is None or prepared.product is None or not x.is_contiguous() or not prepared.product.accepts(x):
            return None
        try:
            versions = [prepared.versions(place) for place in range(len(self._layers))]
        except RuntimeError:
            return None
        first, *others = prepared.product.run(x)
        self._waiting = _Waiting(prepared, _key(x), versions, dict(enumerate(others, 1)))
        return first

    def _current(self) -> PreparedFirst | None:
        prepared = self._prepared
        if prepared is not None and prepared.fresh():
            return prepared
        layers = [layer() for layer in self._layers]
        alive = [layer for layer in layers if layer is not None]
        self._waiting = None
        self._prepared = PreparedFirst(alive) if len(alive) == len(layers) else None
        return self._prepared


def _key(x: Tensor) -> tuple[object, ...]:
    return x.dtype, x.shape, ctypes.string_at(x.data_ptr(), x.nbytes)
