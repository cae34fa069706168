"""A compressed model in training: dense weights in place of its compressed linears, and what its parts learn from them.

    with Student(tuning.model) as student:
        loss = Distillation(tuning.model, tuning.teacher, calibration)
        for sequences in loss.batches(train, size, seed):
            student.zero_gradients()
            loss.backward(sequences)            # dL/dW of every compressed linear: `layer.gradient`
            student.pull_back()                 # dL/d(scales, codebooks, factors, ...): `.grad` of `student.numbers()`
            ...                                 # any optimizer; codes: put another tensor into `layer.tensor`
            student.refresh()                   # dense weights of the changed numbers and codes
        best = student.snapshot()               # rounded to the stored dtypes
    best.install(tuning.model)

One backward through plain linears gives the gradient of every dense weight; each part maps it to its own numbers.
On leaving, the compressed linears stand where they stood, unchanged, also after an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from types import TracebackType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.core.errors import NumericsError
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.frozen import frozen
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.transform import Transform

POSITIVE_FLOOR = 0.05


class DenseLinear(nn.Module):
    """y = T(x) W^T + b, W the dense sum of the parts of a compressed tensor [out, width of T] in the model's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, transform: Transform | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = bias
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.transform is None else self.transform.apply(x)
        return nn.functional.linear(x, self.weight, self.bias)


class Layer:
    """One compressed linear in training.

    tensor     its codes as they are now, with the numbers that it began with
    numbers    for each part, the float32 leaves that stand for its stored numbers (`Part.continuous`)
    dense      the linear that stands in the model meanwhile
    """

    def __init__(self, name: str, module: CompressedLinear, dtype: torch.dtype) -> None:
        self.name = name
        self.module = module
        self.tensor = module.tensor
        self.numbers: tuple[dict[str, Tensor], ...] = tuple(
            {key: value.detach().float().clone().requires_grad_() for key, value in part.continuous().items()}
            for part in self.tensor.parts
        )
        # a scale that changed its sign, or vanished, would not be stored: see Part.with_continuous
        self._floors = [
            (leaf, POSITIVE_FLOOR * leaf.detach()) for leaf in self.leaves() if bool((leaf.detach() > 0).all())
        ]
        with torch.no_grad():
            self.dense = DenseLinear(self.weight().to(dtype), module.bias, self.tensor.transform)

    def leaves(self) -> Iterator[Tensor]:
        """All numbers of all parts."""
        for numbers in self.numbers:
            yield from numbers.values()

    def weight(self) -> Tensor:
        """Float32 [out, width]: codes as they are now, numbers as they are now; differentiable in the numbers."""
        parts = zip(self.tensor.parts, self.numbers, strict=True)
        return reduce(torch.add, (part.dense(numbers) for part, numbers in parts))

    @property
    def gradient(self) -> Tensor:
        """dL/dW, float32 [out, width], of the last backward. Raises NumericsError if it is missing or not finite."""
        gradient = self.dense.weight.grad
        if gradient is None or not bool(torch.isfinite(gradient).all()):
            raise NumericsError(
                f"{self.name}: the gradient of its weight is {'missing' if gradient is None else 'NaN'}."
            )
        return gradient.float()

    def pull_back(self) -> None:
        """Gradients of the numbers from that of the weight: one product with the Jacobian of `weight`."""
        if any(True for _ in self.leaves()):
            with torch.enable_grad():
                self.weight().backward(self.gradient)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Lift numbers that began positive to a twentieth of that, should an update have taken them below it."""
        for leaf, floor in self._floors:
            torch.maximum(leaf, floor, out=leaf)

    @torch.no_grad()
    def refresh(self) -> None:
        """Dense weight of the present codes and numbers."""
        self.keep_positive()
        self.dense.weight.copy_(self.weight())

    def stored(self) -> CompressedTensor:
        """The tensor with its present numbers rounded to their stored dtypes."""
        pairs = zip(self.tensor.parts, self.numbers, strict=True)
        return replace(self.tensor, parts=tuple(part.with_continuous(numbers) for part, numbers in pairs))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a student has learnt, as it is stored.

    tensors       name of a compressed linear -> its weight
    parameters    name of a dense parameter of the model -> its values
    """

    tensors: Mapping[str, CompressedTensor]
    parameters: Mapping[str, Tensor]

    @torch.no_grad()
    def install(self, model: PreTrainedModel) -> None:
        """Put everything into the compressed model, in place."""
        for name, tensor in self.tensors.items():
            module = model.get_submodule(name)
            assert isinstance(module, CompressedLinear)
            module.set_tensor(tensor)
        for name, values in self.parameters.items():
            model.get_parameter(name).copy_(values)


class Student:
    """A context in which the compressed linears of `model` are dense and all else is frozen.

    parameters    names of dense parameters of the model (norms, say) that are trained as well
    """

    def __init__(self, model: PreTrainedModel, parameters: Iterable[str] = ()) -> None:
        self.model = model
        self.layers = [
            Layer(name, module, model.dtype)
            for name, module in model.named_modules()
            if isinstance(module, CompressedLinear)
        ]
        self._trained = {name: model.get_parameter(name) for name in parameters}
        self._original = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        self.masters = {name: value.float().clone().requires_grad_() for name, value in self._original.items()}
        self._frozen = frozen(model)

    def __enter__(self) -> Student:
        self._frozen.__enter__()
        for parameter in self._trained.values():
            parameter.requires_grad_()
        for layer in self.layers:
            self.model.set_submodule(layer.name, layer.dense)
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self.layers:
            self.model.set_submodule(layer.name, layer.module)
        self._frozen.__exit__(kind, error, trace)
        for name, parameter in self._trained.items():
            parameter.copy_(self._original[name])
            parameter.grad = None

    def numbers(self) -> list[Tensor]:
        """All float32 leaves: the numbers of all parts, and the trained parameters."""
        return [leaf for layer in self.layers for leaf in layer.leaves()] + list(self.masters.values())

    def zero_gradients(self) -> None:
        for tensor in self.numbers() + list(self._trained.values()) + [layer.dense.weight for layer in self.layers]:
            tensor.grad = None

    def pull_back(self) -> None:
        """`.grad` of all `numbers`, from the gradients of the dense weights."""
        for layer in self.layers:
            layer.pull_back()
        for name, parameter in self._trained.items():
            self.masters[name].grad = None if parameter.grad is None else parameter.grad.float()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the model compute with the present codes and numbers."""
        for layer in self.layers:
            layer.refresh()
        for name, parameter in self._trained.items():
            parameter.copy_(self.masters[name])

    def snapshot(self) -> Snapshot:
        """What would be stored now. Raises NumericsError if a number cannot be."""
        parameters = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        return Snapshot({layer.name: layer.stored() for layer in self.layers}, parameters)

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        """Compute with the stored values of a snapshot until the next `refresh`; codes and numbers stay as they are."""
        for layer in self.layers:
            parts = snapshot.tensors[layer.name].parts
            layer.dense.weight.copy_(reduce(torch.add, (part.dequantize() for part in parts)))
        for name, parameter in self._trained.items():
            parameter.copy_(snapshot.parameters[name])
