"""The module that stands where a linear layer was: a compressed tensor and a bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import CheckpointError
from trimtab.models.shared_input import PreparedFirst, SharedInput
from trimtab.tensors.compressed import CompressedTensor


class CompressedLinear(nn.Module):
    """y = x W^T + b with W a CompressedTensor; x [..., in] -> y [..., out] in the dtype of x.

    The tensor's buffers "0.codes", "0.scales", ... are registered as `part0_codes`, `part0_scales`, ..., so that
    state dictionaries, safetensors and moves between devices see them. Their dtype is part of the format: `.to(dtype)`,
    `.half()` and the like move them and cast the bias, but leave codes and scales exactly as they were stored.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init__(self, tensor: CompressedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self._spec = tensor.spec()
        self._buffer_names = {name: _module_name(name) for name in tensor.state()}
        for name, value in tensor.state().items():
            self.register_buffer(self._buffer_names[name], value)
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self._built: tuple[tuple[Tensor, ...], CompressedTensor] | None = None
        self._prepared: PreparedFirst | None = None
        self._shared: tuple[SharedInput, int] | None = None

    @classmethod
    def empty(cls, spec: Mapping[str, Any], bias: Tensor | None = None) -> CompressedLinear:
        """A layer of this spec on the meta device, to be filled by a loader. Raises CheckpointError on a bad spec."""
        state = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in CompressedTensor.buffers(spec).items()
        }
        return cls(CompressedTensor.from_state(spec, state), bias)

    @property
    def spec(self) -> dict[str, Any]:
        """JSON values from which `empty` makes a layer of this form."""
        return self._spec

    @property
    def tensor(self) -> CompressedTensor:
        """The compressed weight over the buffers as they are now; rebuilt, without copying, when one was exchanged."""
        buffers = tuple(self._buffers[name] for name in self._buffer_names.values())
        if self._built is None or any(a is not b for a, b in zip(self._built[0], buffers, strict=True)):
            present = tuple(b for b in buffers if b is not None)
            if len(present) < len(buffers):
                raise CheckpointError(
                    f"a compressed layer lacks one of its buffers {list(self._buffer_names.values())}."
                )
            state = dict(zip(self._buffer_names, present, strict=True))
            self._built = (present, CompressedTensor.from_state(self._spec, state))
        return self._built[1]

    def set_tensor(self, tensor: CompressedTensor) -> None:
        """Put another weight of the same spec here. Raises CheckpointError if a buffer has another shape or dtype."""
        if tensor.spec() != self._spec:
            raise CheckpointError(f"a weight of another form ({tensor.spec()}) cannot replace {self._spec}.")
        for name, value in tensor.state().items():
            self.register_buffer(self._buffer_names[name], value)
        self._built = None

    def stored(self) -> dict[str, Tensor]:
        """Attribute name -> buffer of everything that stands for the weight; the bias is not among them."""
        return {name: self.get_buffer(name) for name in self._buffer_names.values()}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense [out, in] weight that this layer stands for."""
        return self.tensor.dequantize(dtype)

    def share(self, shared: SharedInput | None) -> None:
        """Let layers that read the same input compute together while decoding; None: each alone."""
        self._shared = None if shared is None else (shared, shared.place(self))

    def forward(self, x: Tensor) -> Tensor:
        y = None if torch.is_grad_enabled() else self._decoded(x)
        if y is None:
            y = self.tensor.matmul(x)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias

    def _decoded(self, x: Tensor) -> Tensor | None:
        """`tensor.matmul(x)` through what was prepared for few rows; None where that does not apply."""
        first = None
        if self._shared is not None:
            shared, place = self._shared
            first = shared.product(place, x)
        if first is None:
            prepared = self._prepared
            if prepared is None or not prepared.fresh():
                prepared = self._prepared = PreparedFirst((self,))
            if prepared.product is None or not prepared.product.accepts(x):
                return None
            first = prepared.product.run(x)[0]
        if len(self._spec["parts"]) > 1:
            for part in self.tensor.parts[1:]:
                first = part.add_to(first, x)
        return first

    def __getstate__(self) -> dict[str, Any]:
        """Copies share no calls, and prepare their own."""
        return {**self.__dict__, "_prepared": None, "_shared": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        exact = {id(buffer) for buffer in self.stored().values()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if id(tensor) in exact and changed.dtype != tensor.dtype:
                return tensor.to(changed.device)
            return changed

        self._built = None
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "a CompressedLinear has no dense 'weight'; read an approximation with .dequantize(), or the codes "
                "with .tensor"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        kinds = "+".join(part["kind"] for part in self._spec["parts"])
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kinds}"
        )


def _module_name(buffer: str) -> str:
    """`0.codes` -> `part0_codes`, `transform.0.index` -> `transform_0_index`: attribute names cannot hold dots."""
    name = buffer.replace(".", "_")
    return f"part{name}" if name[0].isdecimal() else name
