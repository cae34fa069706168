"""The module that stands where a linear layer was: a compressed tensor and a bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import CheckpointError
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

    def forward(self, x: Tensor) -> Tensor:
        y = self.tensor.matmul(x)
        return y if self.bias is None else y + self.bias

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
