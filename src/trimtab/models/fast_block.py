"""Decoder blocks while decoding: two native calls around the cache and attention (`use_fast_blocks`).

The block's modules stay what they are and hold what they hold. Whatever looks into a block or changes a part of it, a
hook, an adapter, another forward, gets the ordinary forward, and so does everything that is not decoding.
"""

from __future__ import annotations

import logging
import operator
import os
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimtab.kernels.block_step import (
    MAX_ROWS,
    Block,
    Layer,
    LowRankTerm,
    Norm,
    PreparedBlock,
    SparseTerm,
    refuses,
)
from trimtab.kernels.op import KERNELS_VARIABLE
from trimtab.models.attention import BACKEND
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.families.base import Family
from trimtab.models.views import BlockView
from trimtab.tensors.base import Part
from trimtab.tensors.low_rank import LowRank
from trimtab.tensors.sparse import SparseOutliers

log = logging.getLogger("trimtab.models")

_ATTENTION = (BACKEND, "sdpa")
_logged: set[str] = set()


def use_fast_block(view: BlockView, family: Family) -> str | None:
    """Let a block take few tokens in two native calls, or say why not.

    Parameters, state dictionaries, hooks, classes and saving stay as they are; copies of the block are plain. A block
    that is fast already stays so. What it is made of is looked at in every call, and found anew when it has changed.
    """
    block = view.module
    if family.attention_arguments is None:
        return f"blocks of {family.name} have another form"
    own = block.__dict__.get("forward")
    if isinstance(own, _FewTokens):
        return None
    if own is not None and own != types.MethodType(type(block).forward, block):
        return "something else has replaced its forward"
    block.forward = _FewTokens(view, family)
    return None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What a block was when it was looked at, and its step, or None if it has to run as it is."""

    seen: list[object]
    step: PreparedBlock | None


class _FewTokens:
    """The forward of one block. It must not keep the block alive, and copies of the block get the plain forward."""

    def __init__(self, view: BlockView, family: Family) -> None:
        assert family.attention_arguments is not None
        self._block = weakref.ref(view.module)
        self._attention: Any = view.attention.module
        self._mlp = view.mlp.module
        self._attention_norm, self._mlp_norm = view.attention.norm, view.mlp.norm
        self._q_norm, self._k_norm = view.attention.q_norm, view.attention.k_norm
        self._head_dim = view.attention.head_dim
        self._names = {linear.role: (linear.parent, linear.name.rpartition(".")[2]) for linear in view.linears}
        self._arguments: Callable[[Any], dict[str, Any]] = family.attention_arguments
        self._home = f"transformers.models.{family.model_type}.modeling_{family.model_type}"
        self._prepared: _Prepared | None = None

    @property
    def block(self) -> nn.Module:
        block = self._block()
        assert block is not None, "the forward of a block outlived it"
        return block

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        block = self.block
        if not args and _decodes(hidden_states):
            step, attention = self._step(block), self._attention.config._attn_implementation
            if step is not None and attention in _ATTENTION and self._suits(step, hidden_states, kwargs):
                return self._run(step, ALL_ATTENTION_FUNCTIONS[attention], hidden_states, **kwargs)
        elif not getattr(hidden_states, "is_cpu", False):
            self._prepared = None  # it would keep what the block had before it was moved
        return type(block).forward(block, hidden_states, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[nn.Module, str]]:
        return getattr, (self.block, "forward")

    def _run(
        self,
        step: PreparedBlock,
        attend: Callable[..., Any],
        hidden: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """The block's forward; cache and attention function are called as its attention calls them."""
        attention = self._attention
        queries, keys, values = step.before(hidden, *position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, attention.layer_idx)
        attended, _ = attend(
            attention,
            queries,
            keys,
            values,
            attention_mask,
            dropout=0.0,
            scaling=attention.scaling,
            **self._arguments(attention),
            **kwargs,
        )
        rows, tokens, _ = hidden.shape
        return step.after(attended.reshape(rows, tokens, -1).to(hidden.dtype).contiguous(), hidden)

    def _suits(self, step: PreparedBlock, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the tensors of a call are what the step reads, and nobody asks for more than the output."""
        rows, tokens, width = hidden.shape
        rotary = kwargs.get("position_embeddings")
        return (
            hidden.dtype == step.dtype
            and width == step.hidden
            and isinstance(rotary, tuple)
            and all(
                type(table) is Tensor
                and table.dtype == step.dtype
                and table.is_cpu
                and table.shape in ((1, tokens, step.head_dim), (rows, tokens, step.head_dim))
                and table.is_contiguous()
                for table in rotary
            )
            and rotary[0].shape == rotary[1].shape
            and not kwargs.get("output_attentions")
        )

    def _step(self, block: nn.Module) -> PreparedBlock | None:
        seen, prepared = self._seen(block), self._prepared
        if (
            prepared is None
            or len(seen) != len(prepared.seen)
            or not all(map(operator.is_, seen, prepared.seen))
            or (prepared.step is not None and prepared.step.moved())
        ):
            step, reason = self._prepare(block)
            _log_once(f"decoder blocks decode in two native calls{f', but not where {reason}' if reason else ''}")
            prepared = self._prepared = _Prepared(seen, step)
        return prepared.step

    def _seen(self, block: nn.Module) -> list[object]:
        """Everything on which `_prepare` depends; to be compared by identity, and kept so that it stays comparable."""
        found: list[object] = [block.training, self._attention.training]
        for parent in (block, self._attention, self._mlp):
            for module in parent._modules.values():
                if module is None:
                    continue
                own = module.__dict__
                found += (module, type(module).forward, own.get("forward"), own.get("variance_epsilon"))
                found.append(bool(own["_forward_hooks"] or own["_forward_pre_hooks"]))
                found += own["_parameters"].values()
                found += own["_buffers"].values()
        return found

    def _prepare(self, block: nn.Module) -> tuple[PreparedBlock | None, str | None]:
        """The step, or None and why there is none."""
        if block.training or self._attention.training:
            return None, "it is being trained"
        inside = [module for parent in (block, self._attention, self._mlp) for module in parent._modules.values()]
        for module in inside:
            if module is None:
                return None, "a module inside is missing"
            if module._forward_hooks or module._forward_pre_hooks:
                return None, "a module inside has a hook"
            if (own := module.__dict__.get("forward")) and own != types.MethodType(type(module).forward, module):
                return None, "a module inside has a forward of its own"
        norms = [self._attention_norm, self._mlp_norm, self._q_norm, self._k_norm]
        for part in (block, self._attention, self._mlp, *norms):
            if part is not None and not self._plain(part):
                return None, f"a {type(part).__name__} is not transformers' own"
        linears = {role: getattr(parent, name) for role, (parent, name) in self._names.items()}
        activation = self._mlp.act_fn
        known = [*linears.values(), activation, *norms, self._attention, self._mlp]
        if len(inside) != sum(module is not None for module in known) or any(m not in known for m in inside):
            return None, "there is a module that is not known"
        if type(activation) not in (nn.SiLU, SiLUActivation):
            return None, f"the activation is {type(activation).__name__}"
        layers: dict[str, Layer] = {}
        for role, linear in linears.items():
            if type(linear) is not CompressedLinear:
                return None, f"{role} is a {type(linear).__name__}"
            tensor = linear.tensor
            first = tensor.parts[0]
            weight = first.grid_weight() or first.sparse_weight() or first.gather_weight()
            if weight is None or tensor.transform is not None:
                return None, f"{role} is no grid, bitmap or columns, or has a transform"
            terms = [_term(part) for part in tensor.parts[1:]]
            known_terms = [term for term in terms if term is not None]
            if len(known_terms) < len(terms):
                return None, f"{role} has a second part that is neither of low rank nor sparse"
            layers[role] = Layer(weight, linear.bias, tuple(known_terms))
        made = Block(
            **layers,
            attention_norm=_norm(self._attention_norm),
            mlp_norm=_norm(self._mlp_norm),
            q_norm=None if self._q_norm is None else _norm(self._q_norm),
            k_norm=None if self._k_norm is None else _norm(self._k_norm),
            head_dim=self._head_dim,
        )
        reason = refuses(made)
        return (PreparedBlock(made), None) if reason is None else (None, reason)

    def _plain(self, module: nn.Module) -> bool:
        """Whether class and forward are transformers' own for this family."""
        return type(module).__module__ == self._home and type(module).forward.__module__ in (
            self._home,
            "transformers.modeling_layers",
        )


def _decodes(x: Tensor) -> bool:
    """Whether this is an input of few rows into which nothing (gradients, tracing, autocast, other kernels) looks."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.ndim == 3
        and 0 < x.shape[0] * x.shape[1] <= MAX_ROWS
        and x.is_contiguous()
        and not torch.is_grad_enabled()
        and not os.environ.get(KERNELS_VARIABLE)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not hooks._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _norm(module: nn.Module) -> Norm:
    weight, epsilon = module.weight, module.variance_epsilon
    assert isinstance(weight, Tensor)
    return Norm(weight, float(epsilon))  # type: ignore[arg-type]


def _term(part: Part) -> LowRankTerm | SparseTerm | None:
    if isinstance(part, LowRank):
        return LowRankTerm(part.left, part.right)
    if isinstance(part, SparseOutliers):
        return SparseTerm(part.values, part.columns, part.offsets)
    return None


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        log.info(message)
