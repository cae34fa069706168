"""Dense 16-bit linear layers at the speed of memory while decoding: `use_fast_linear(model)`.

For a few rows of x, torch's linear on 16-bit weights reads them at less than half of what memory gives. This lets the
`nn.Linear` modules of a model multiply such inputs with `kernels/half_linear`, and everything else as they did.
"""

from __future__ import annotations

import os
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.kernels import library
from trimtab.kernels.half_linear import native
from trimtab.kernels.op import KERNELS_VARIABLE

_HALVES = (torch.bfloat16, torch.float16)


class FastLinear:
    """What `use_fast_linear` changed. `remove()` undoes it, and so does leaving a `with` block.

    names       of the modules that multiply few rows with half_linear
    unchanged   name -> why not, of the other modules that are linear layers
    """

    names: tuple[str, ...]
    unchanged: Mapping[str, str]

    def __init__(self, modules: Mapping[str, nn.Linear], unchanged: Mapping[str, str]) -> None:
        self.names = tuple(modules)
        self.unchanged = dict(unchanged)
        self._installed = [(module, _FewRows(module)) for module in modules.values()]
        for module, forward in self._installed:
            module.forward = forward  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give every module its own forward back; what others have put in its place since then stays."""
        for module, forward in self._installed:
            if module.__dict__.get("forward") is forward:
                del module.forward
        self._installed.clear()

    def __enter__(self) -> FastLinear:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def use_fast_linear(model: nn.Module) -> FastLinear:
    """Let the plain `nn.Linear` modules with 16-bit weights on the CPU use `half_linear` for few rows.

    This holds where no gradient is wanted, x has the dtype of the weight and at most `half_linear.MAX_ROWS` rows, and
    TRIMTAB_KERNELS names no other kernel; otherwise a module computes exactly what it did. Parameters, state
    dictionaries, classes, hooks, saving and moves stay as they are; copies (deepcopy, pickle) are plain. A module that
    is fast already is left to its handle. Where no native kernel can run, or TRIMTAB_KERNELS names another one, nothing
    changes and `unchanged` says why.
    """
    everywhere = _nowhere()
    modules: dict[str, nn.Linear] = {}
    unchanged: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            unchanged[name] = everywhere or "a Conv1D keeps its weight as [in, out], and half_linear reads [out, in]"
        elif isinstance(module, nn.Linear):
            if reason := everywhere or _not_fast(module):
                unchanged[name] = reason
            else:
                modules[name] = module
    return FastLinear(modules, unchanged)


def _nowhere() -> str | None:
    """Why no module can be fast, or None."""
    if (forced := os.environ.get(KERNELS_VARIABLE)) and forced != "native":
        return f"{KERNELS_VARIABLE}={forced}"
    if reason := library.absent():
        return reason
    if library.machine_isas() == ("scalar",):
        return "the kernels know no vector instructions of this processor, so torch is faster"
    return None


def _not_fast(module: nn.Linear) -> str | None:
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, not a plain nn.Linear"
    if isinstance(own := module.__dict__.get("forward"), _FewRows):
        return "it is fast already"
    if own is not None and own != types.MethodType(nn.Linear.forward, module):
        return "something else has replaced its forward"
    if module.weight.dtype not in _HALVES or not module.weight.is_cpu:
        return f"its weight is {module.weight.dtype} on {module.weight.device}, not 16-bit on the CPU"
    return None


class _FewRows:
    """The forward of one module. It must not keep the module alive, and copies of the module get the plain forward."""

    def __init__(self, module: nn.Linear) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> nn.Linear:
        module = self._module()
        assert module is not None, "the forward of a module outlived it"
        return module

    def __call__(self, input: Tensor) -> Tensor:
        module = self.module
        weight, bias = module.weight, module.bias
        allowed = os.environ.get(KERNELS_VARIABLE) in (None, "", "native")
        if allowed and _plain(input, weight, bias) and native.refuses(input, weight, bias) is None:
            return native.half_linear_native(input, weight, bias)
        return nn.Linear.forward(module, input)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[nn.Linear, str]]:
        return getattr, (self.module, "forward")


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether shapes and dtypes fit and nothing (tracing, autocast, tensor subclasses) looks into the product."""
    return (
        type(x) is Tensor
        and type(weight) is nn.Parameter
        and x.dtype == weight.dtype
        and x.shape[-1:] == weight.shape[1:]
        and (bias is None or bias.dtype == x.dtype)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )
