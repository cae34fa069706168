"""A transformer block of Llama's form as tensors, and what must hold of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor

from trimtab.kernels.gather_matmul.weight import GatherWeight
from trimtab.kernels.grid_matmul.weight import GridWeight
from trimtab.kernels.sparse_matmul.weight import SparseWeight


@dataclass(frozen=True, eq=False)
class LowRankTerm:
    """+ (x right^T) left^T with left [out, r] and right [r, in] of one dtype, as in `kernels/terms`."""

    left: Tensor
    right: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def fits(self, out_features: int, in_features: int) -> bool:
        rank = self.left.shape[-1]
        return tuple(self.left.shape) == (out_features, rank) and tuple(self.right.shape) == (rank, in_features)


@dataclass(frozen=True, eq=False)
class SparseTerm:
    """+ x S^T with S in compressed rows, as in `kernels/terms`; columns are below `in`, which is not checked here."""

    values: Tensor
    columns: Tensor
    offsets: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "columns": self.columns, "offsets": self.offsets}

    def fits(self, out_features: int, in_features: int) -> bool:
        return tuple(self.offsets.shape) == (out_features + 1,) and self.values.shape == self.columns.shape


@dataclass(frozen=True, eq=False)
class Layer:
    """y = x W^T, or what gather_matmul makes of x and W, plus each term in their order, plus bias [out]; each sum is
    rounded to the dtype of x, and of bias."""

    weight: GridWeight | SparseWeight | GatherWeight
    bias: Tensor | None = None
    terms: tuple[LowRankTerm | SparseTerm, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        found = self.weight.tensors() | ({} if self.bias is None else {"bias": self.bias})
        for place, term in enumerate(self.terms):
            found |= {f"terms[{place}].{name}": tensor for name, tensor in term.tensors().items()}
        return found


@dataclass(frozen=True, eq=False)
class Norm:
    """weight * (x / sqrt(mean(x^2) + epsilon)); the weight has the dtype of x, to which the quotient is rounded."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Block:
    """norm, q, k, v, rotary embedding, attention, o and a residual sum; norm, down(silu(gate) * up) and another.

    q_norm, k_norm    of each head, before it is rotated, where the family has them
    head_dim          of queries, keys and values; all of it is rotated, entry i with entry i + head_dim / 2
    """

    q: Layer
    k: Layer
    v: Layer
    o: Layer
    gate: Layer
    up: Layer
    down: Layer
    attention_norm: Norm
    mlp_norm: Norm
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    head_dim: int

    def layers(self) -> dict[str, Layer]:
        """By the name of their field."""
        return {name: part for name, part in self._parts() if isinstance(part, Layer)}

    def norms(self) -> dict[str, Norm]:
        """Those that are there, by the name of their field."""
        return {name: part for name, part in self._parts() if isinstance(part, Norm)}

    def tensors(self) -> dict[str, Tensor]:
        """All, by a name that says where they are."""
        found = {f"{name}.{own}": t for name, layer in self.layers().items() for own, t in layer.tensors().items()}
        return found | {name: norm.weight for name, norm in self.norms().items()}

    def misfit(self) -> str | None:
        """Which two shapes do not fit each other, or None. Raises ConfigError if a weight is wrong in itself."""
        layers = self.layers()
        for layer in layers.values():
            layer.weight.check()
        hidden, inner = self.q.weight.in_features, self.gate.weight.out_features
        queries, keys = self.q.weight.out_features, self.k.weight.out_features
        wanted = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        wanted |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        for name, layer in layers.items():
            found = layer.weight.out_features, layer.weight.in_features
            if found != wanted[name]:
                return f"{name} is {list(found)} where {list(wanted[name])} would fit"
            for term in layer.terms:
                if not term.fits(*found):
                    shapes = {own: list(tensor.shape) for own, tensor in term.tensors().items()}
                    return f"{name} is {list(found)}, a term of it {shapes}"
            if layer.bias is not None and tuple(layer.bias.shape) != found[:1]:
                return f"the bias of {name} is {list(layer.bias.shape)}, its outputs are {found[0]}"
        for name, norm in self.norms().items():
            width = hidden if name in ("attention_norm", "mlp_norm") else self.head_dim
            if tuple(norm.weight.shape) != (width,):
                return f"{name} is {list(norm.weight.shape)}, its inputs are {width}"
        if self.head_dim % 2 or queries % self.head_dim or keys % self.head_dim:
            return f"{queries} query and {keys} key rows are not heads of {self.head_dim}, an even number"
        return None

    def _parts(self) -> Iterator[tuple[str, object]]:
        return ((field.name, getattr(self, field.name)) for field in fields(self))
