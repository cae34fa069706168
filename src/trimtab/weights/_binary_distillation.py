"""Stage 3 of QBB: train the scales of all layers together, on text that the original model writes itself.

Sequences begin with a random token and are drawn at temperature 1. Of them those are kept on which the logits of the
two models differ most. The loss of a batch is

    |l_T - l_S|^2 / var(l_T)  +  mean over blocks of |f_T - f_S|^2 / var(f_T)

with logits l and block outputs f of the original (T) and of a hybrid (S), in which each block is the compressed one
with probability p and else the original's; p rises from 1/2 to 1 over the first half, so that the target is in reach
at first. The scales of least loss on other written sequences, without original blocks, are kept: those from before
training included.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core import progress as bars
from trimtab.core.errors import NumericsError
from trimtab.models.captured_call import first_output
from trimtab.models.views import ModelView
from trimtab.weights._student import Student
from trimtab.weights._tuning import Tuning
from trimtab.weights.base import Notes

if TYPE_CHECKING:
    from trimtab.weights.qbb import Qbb

_BATCH = 8
_WRITING_BATCH = 64
_HELD_OUT = 16  # sequences that only measure


def distil(method: Qbb, tuning: Tuning) -> Notes:
    """Train the scales of `tuning.model` in place. Deterministic in the seed; raises NumericsError if it diverges."""
    generator = torch.Generator().manual_seed(tuning.seed)
    written = write_sequences(tuning.teacher, method.sequences, method.length, generator)
    held_out = write_sequences(tuning.teacher, _HELD_OUT, method.length, generator)
    kept = _most_different(tuning, written, max(1, round(method.keep_fraction * len(written))))
    batches = [batch for _ in range(method.epochs) for batch in _batches(kept, generator)]
    blocks = [block.name for block in ModelView.of(tuning.teacher).blocks]
    training = tuning.model.training
    tuning.model.train(False)
    try:
        with Student(tuning.model) as student:
            best, before = student.snapshot(), held_out_loss(tuning, blocks, held_out)
            lowest = before
            optimizer = torch.optim.Adam(_groups(student, method.learning_rate))
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _cosine(s / len(batches)))
            with bars.progress("training the scales", len(batches), shown=tuning.progress) as advance:
                for step, batch in enumerate(batches):
                    student.zero_gradients()
                    loss = _hybrid_loss(tuning, blocks, batch, min(1.0, 0.5 + step / len(batches)), generator)
                    if not bool(torch.isfinite(loss)):
                        raise NumericsError(
                            f"training the scales diverged in step {step + 1} of {len(batches)} (loss {loss.item()}). "
                            f"Lower learning_rate ({method.learning_rate}), or leave this stage out (holistic=false)."
                        )
                    if loss.requires_grad:  # all blocks may have been the original's
                        torch.autograd.backward(loss)
                    for layer in student.layers:
                        if layer.dense.weight.grad is not None:
                            layer.pull_back()
                    optimizer.step()
                    schedule.step()
                    student.refresh()
                    advance(f"loss {loss.item():.4g}")
                    ends_epoch = (step + 1) % (len(batches) // method.epochs) == 0
                    if ends_epoch and (now := held_out_loss(tuning, blocks, held_out)) < lowest:
                        best, lowest = student.snapshot(), now
        best.install(tuning.model)
    finally:
        tuning.model.train(training)
    return {"kept_sequences": len(kept), "held_out_loss_before": before, "held_out_loss": lowest}


@torch.no_grad()
def write_sequences(model: PreTrainedModel, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Token ids [count, length]: a uniformly random first token each, then draws from the model at temperature 1."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    first = torch.randint(vocabulary, (count, 1), generator=generator)
    written = []
    for start in range(0, count, _WRITING_BATCH):
        tokens, cache = first[start : start + _WRITING_BATCH].to(model.device), None
        rows = tokens
        for _ in range(length - 1):
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chances = output.logits[:, -1].float().softmax(-1).cpu()
            tokens = torch.multinomial(chances, 1, generator=generator).to(model.device)
            rows = torch.cat([rows, tokens], dim=1)
        written.append(rows.cpu())
    return torch.cat(written)


@torch.no_grad()
def _most_different(tuning: Tuning, sequences: Tensor, count: int) -> Tensor:
    """The `count` sequences with the largest mean squared difference in logits between the two models."""
    gaps = []
    for batch in sequences.split(_BATCH):  # type: ignore[no-untyped-call]
        logits = [model(input_ids=batch.to(model.device)).logits.float() for model in (tuning.teacher, tuning.model)]
        gaps.append((logits[0] - logits[1]).square().mean(dim=(1, 2)).cpu())
    return sequences[torch.cat(gaps).argsort(descending=True, stable=True)[:count]]


def _groups(student: Student, rate: float) -> list[dict[str, object]]:
    """Parameter groups whose learning rate is in units of the mean magnitude of their numbers."""
    return [{"params": [n], "lr": rate * max(float(n.detach().abs().mean()), 1e-12)} for n in student.numbers()]


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _batches(sequences: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """All sequences once, in a new order."""
    return torch.split(sequences[torch.randperm(len(sequences), generator=generator)], _BATCH)


def held_out_loss(tuning: Tuning, blocks: Sequence[str], sequences: Tensor) -> float:
    """Mean loss of the compressed model, without any of the original's blocks."""
    with torch.no_grad():
        batches = torch.split(sequences, _BATCH)
        return sum(float(_loss(tuning, blocks, batch)) * len(batch) for batch in batches) / len(sequences)


def _hybrid_loss(
    tuning: Tuning, blocks: Sequence[str], batch: Tensor, share: float, generator: torch.Generator
) -> Tensor:
    """The loss with each block of the student replaced by the original's with probability 1 - share."""
    chosen = torch.rand(len(blocks), generator=generator) >= share
    with _original_blocks(tuning, [name for name, swap in zip(blocks, chosen.tolist(), strict=True) if swap]):
        return _loss(tuning, blocks, batch)


def _loss(tuning: Tuning, blocks: Sequence[str], batch: Tensor) -> Tensor:
    """Normalised errors of the logits and, on average, of the output of each of `blocks`, by name."""
    with torch.no_grad():
        target, target_features = _forward(tuning.teacher, blocks, batch)
    logits, features = _forward(tuning.model, blocks, batch)
    pairs = list(zip(target_features, features, strict=True))
    return _normalised(target, logits) + sum(_normalised(*pair) for pair in pairs) / len(pairs)


def _normalised(target: Tensor, found: Tensor) -> Tensor:
    target, found = target.float(), found.float()
    return (target - found).square().mean() / target.var().clamp_min(1e-12)


def _forward(model: PreTrainedModel, blocks: Sequence[str], batch: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the output of each of `blocks`."""
    features: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        for name in blocks:
            block = model.get_submodule(name)
            handle = block.register_forward_hook(lambda _, __, output: features.append(first_output(output)))
            hooks.callback(handle.remove)
        logits = model(input_ids=batch.to(model.device), use_cache=False).logits
    return logits, features


@contextlib.contextmanager
def _original_blocks(tuning: Tuning, names: Sequence[str]) -> Iterator[None]:
    """Within, these blocks of the model are those of the original."""
    own = {name: tuning.model.get_submodule(name) for name in names}
    try:
        for name in names:
            tuning.model.set_submodule(name, tuning.teacher.get_submodule(name))
        yield
    finally:
        for name, block in own.items():
            tuning.model.set_submodule(name, block)
