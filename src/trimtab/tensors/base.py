"""The contract of compressed tensors: values that know how to multiply, how large they are and how to be stored.

A compressed weight is a sum of parts under an input transform,

    W ~ E[ (Q(codes, params) + L1 L2 + S) T ],

each part a `Part`. All parts of one weight have the shape `[out, in]` of that weight; groups run along `in`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, NumericsError, did_you_mean
from trimtab.kernels.gather_matmul import GatherWeight
from trimtab.kernels.grid_matmul import GridWeight, grid_matmul_many
from trimtab.kernels.sparse_matmul import SparseWeight

if TYPE_CHECKING:
    from trimtab.tensors.metric import Metric

_PART_MODULES = ("grid", "low_rank", "sparse", "binary", "table", "codebook", "bitmap", "sparse_grid", "sparse_inputs")
PART_KINDS: dict[str, type[Part]] = {}
"""kind -> class, filled as parts are defined (`part_class` imports them all). Checkpoints load nothing else."""


class Part(ABC):
    """One immutable summand of a compressed tensor. Subclasses set `kind`, which registers them."""

    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if kind := cls.__dict__.get("kind"):
            PART_KINDS[kind] = cls

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of the dense tensor this stands for."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense [out, in] tensor."""

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] -> x @ W^T [..., out], in the dtype of x; uses the fastest kernel that accepts the input.

        The default is the grid kernel with `grid_weight()`, or the product with the dense weight where there is none.
        """
        weight = self.grid_weight()
        if weight is None:
            return torch.nn.functional.linear(x, self.dequantize(x.dtype))
        return grid_matmul_many(x, (weight,))[0]

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """out + `matmul(x)`; `out` [..., out], in the dtype of x, may be overwritten: use what is returned."""
        return out + self.matmul(x)

    def grid_weight(self) -> GridWeight | None:
        """This part as the grid kernels take it, without copying; None if they cannot. Where it is given, `matmul` is
        their product."""
        return None

    def sparse_weight(self) -> SparseWeight | None:
        """The same for the sparse kernels."""
        return None

    def gather_weight(self) -> GatherWeight | None:
        """The same for the kernels that gather columns."""
        return None

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON values from which `buffers` knows names, shapes and dtypes of the buffers: {"kind": ..., ...}."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The buffers as stored: name -> tensor. Contiguous, and all that is needed beside `spec()`."""

    @classmethod
    @abstractmethod
    def buffers(cls, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of the buffers that `from_state` wants. Raises CheckpointError on a bad spec."""

    @classmethod
    @abstractmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> Part:
        """Rebuild without copying. Raises CheckpointError if a buffer is missing or has another shape or dtype."""

    @property
    def code_shape(self) -> tuple[int, int] | None:
        """Shape of the codes, the discrete choices that `project` makes: [out, in], or [out, in / g] if g weights share
        one. None if this part has no codes."""
        return self.shape

    @abstractmethod
    def project(
        self, target: Tensor, metric: Metric | None = None, subset: Tensor | None = None, *, differ: bool = False
    ) -> Part:
        """The part of the same form nearest to the dense `target` [out, in], continuous parameters kept.

        `subset` (bool `code_shape`) limits the change: codes outside it stay as they are. With `differ`, a code inside
        it that is the nearest already becomes the nearest other one. The primitive behind alternating quantization and
        SVD, straight-through training and discrete steps. Raises ConfigError for what does not apply to the part.
        """

    @abstractmethod
    def continuous(self) -> dict[str, Tensor]:
        """The buffers of numbers, not codes, that training may change: a subset of `state()`, as stored."""

    @abstractmethod
    def dense(self, continuous: Mapping[str, Tensor]) -> Tensor:
        """The dense float32 [out, in] weight with `continuous` (float32, each in the shape it has in `continuous()`) in
        place of the stored numbers; differentiable in them. `dense(continuous())` equals `dequantize()`."""

    @abstractmethod
    def with_continuous(self, continuous: Mapping[str, Tensor]) -> Part:
        """This part with `continuous` stored in its dtypes, codes kept. Raises NumericsError if it cannot be."""

    def check(self) -> None:  # noqa: B027 - most parts have something to check, not all
        """Raise CheckpointError if the buffers hold values that no compression writes. The default accepts all.

        `from_state` looks at names, shapes and dtypes only, so that it works on tensors not yet filled; a loader
        calls this once they are.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, padding included."""
        return sum(t.numel() * t.element_size() for t in self.state().values())

    @property
    def read_bytes(self) -> int:
        """Bytes that one decoded token reads, on average; all of them, unless which ones depends on the token."""
        return self.nbytes


def part_class(spec: Mapping[str, Any]) -> type[Part]:
    """The class that a spec's kind names. Raises CheckpointError if there is none."""
    for module in _PART_MODULES:
        importlib.import_module(f"trimtab.tensors.{module}")
    kind = spec.get("kind")
    if kind not in PART_KINDS:
        raise CheckpointError(f"compressed tensor of unknown kind {kind!r}. {did_you_mean(str(kind), PART_KINDS)}")
    return PART_KINDS[kind]


def part_from_state(spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> Part:
    """Rebuild any part; the kind must be one of PART_KINDS. Raises CheckpointError."""
    return part_class(spec).from_state(spec, state)


def shape_from_spec(spec: Mapping[str, Any]) -> tuple[int, int]:
    """The [out, in] shape that a spec holds. Raises CheckpointError if it holds none."""
    shape = spec.get("shape")
    if not (isinstance(shape, Sequence) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise CheckpointError(f"{spec.get('kind')} part: 'shape' must be [out, in], not {shape!r}.")
    return shape[0], shape[1]


def stored_like(part: Part, continuous: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`continuous` in the dtypes in which `part` stores them. Raises NumericsError if one is not finite there."""
    stored = {name: continuous[name].detach().to(old.dtype).contiguous() for name, old in part.continuous().items()}
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"{part.kind} part of shape {list(part.shape)}: '{name}' has values that {tensor.dtype} cannot hold."
            )
    return stored


def dtype_from_spec(spec: Mapping[str, Any], allowed: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype that a spec names. Raises CheckpointError if it is not one of `allowed`."""
    name = spec.get("dtype")
    if name not in allowed:
        raise CheckpointError(f"{spec.get('kind')} part: unknown dtype {name!r}. {did_you_mean(str(name), allowed)}")
    return allowed[str(name)]


def checked_buffers(part: type[Part], spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers that `part.buffers(spec)` names, out of `state`.

    Raises CheckpointError for one that is missing, superfluous, or of another shape or dtype.
    """
    wanted = part.buffers(spec)
    if superfluous := sorted(set(state) - set(wanted)):
        raise CheckpointError(f"{part.kind} part: unexpected buffers {superfluous}; it has {sorted(wanted)}.")
    for name, (shape, dtype) in wanted.items():
        if name not in state:
            raise CheckpointError(f"{part.kind} part: buffer '{name}' is missing; found {sorted(state)}.")
        found = state[name]
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise CheckpointError(
                f"{part.kind} part: buffer '{name}' is {found.dtype} {list(found.shape)}, "
                f"its spec asks for {dtype} {list(shape)}."
            )
    return dict(state)
