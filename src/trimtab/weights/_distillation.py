"""The loss of a student's next-token distributions against its teacher's, in memory bounded by a chunk of logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.errors import NumericsError
from trimtab.models.calibration_set import CalibrationSet

LogitLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits of the student, of the teacher), float32 [tokens, vocabulary] each -> the sum of the loss over the tokens."""
CHUNK_TOKENS = 256
_FORWARD_TOKENS = 4096
_CACHE_BYTES = 1 << 30


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum of KL(teacher || student), nats."""
    p = teacher.log_softmax(-1)
    return (p.exp() * (p - student.log_softmax(-1))).sum()


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over tokens of the mean over the vocabulary of the squared difference."""
    return (student - teacher).square().mean(-1).sum()


def last_hidden(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """What the output head reads, [sequences, length, width]; `mask` is False at padding, on the right."""
    device = model.device
    output = model.base_model(input_ids=tokens.to(device), attention_mask=mask.long().to(device), use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Float32 logits of hidden states, as the model's own forward computes them (Gemma 2 bends them with tanh)."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    logits: Tensor = head(hidden).float()
    bend = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if bend is None else torch.tanh(logits / bend) * bend


class Distillation:
    """Loss per token of `student` against `teacher` on sequences of the calibration text, padding left out.

    Logits exist for 256 tokens at a time: the gradient of the last hidden states is gathered chunk by chunk and goes
    through the model once. The teacher's last hidden states are kept, up to 1 GiB of them.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        calibration: CalibrationSet,
        loss: LogitLoss = kl_divergence,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.calibration = calibration
        self.loss = loss
        self._kept: dict[int, Tensor] = {}
        self._kept_bytes = 0

    def batches(self, sequences: Tensor, size: int, seed: int) -> Iterator[Tensor]:
        """Batches of `size` of these sequences without end, each epoch in another order; all of them if fewer."""
        generator = torch.Generator().manual_seed(seed)
        size = min(size, len(sequences))
        while True:
            order = sequences[torch.randperm(len(sequences), generator=generator)]
            yield from torch.split(order[: len(order) - len(order) % size], size)

    def backward(self, sequences: Tensor) -> float:
        """Loss per token of these sequences; adds its gradient to what the student trains. Raises NumericsError."""
        return self._loss(sequences, backward=True)

    def value(self, sequences: Tensor) -> float:
        """Loss per token of these sequences."""
        return self._loss(sequences, backward=False)

    def _loss(self, sequences: Tensor, *, backward: bool) -> float:
        count = int(self.calibration.mask[sequences].sum())
        per_forward = max(1, _FORWARD_TOKENS // self.calibration.length)
        total = 0.0
        with torch.set_grad_enabled(backward):
            for some in torch.split(sequences, per_forward):
                tokens, mask = self.calibration.tokens[some], self.calibration.mask[some]
                hidden = last_hidden(self.student, tokens, mask)[mask.to(self.student.device)]
                wanted = self._teacher_hidden(some)
                gradient = torch.empty_like(hidden) if backward else None
                for start in range(0, len(hidden), CHUNK_TOKENS):
                    chunk = slice(start, start + CHUNK_TOKENS)
                    total += self._chunk(hidden, wanted[chunk], chunk, count, gradient)
                if gradient is not None:
                    hidden.backward(gradient)  # type: ignore[no-untyped-call]
        if not total < float("inf"):
            raise NumericsError(f"the loss on {len(sequences)} calibration sequences is {total}. Use a lower rate.")
        return total

    def _chunk(self, hidden: Tensor, wanted: Tensor, chunk: slice, count: int, gradient: Tensor | None) -> float:
        """Its share of the mean loss; writes the gradient of these hidden states."""
        with torch.no_grad():
            target = logits_of(self.teacher, wanted)
        piece = hidden[chunk].detach().requires_grad_(gradient is not None)
        loss = self.loss(logits_of(self.student, piece), target) / count
        if gradient is not None:
            (gradient[chunk],) = torch.autograd.grad(loss, piece)
        return float(loss.detach())

    @torch.no_grad()
    def _teacher_hidden(self, sequences: Tensor) -> Tensor:
        """Last hidden states of the teacher at the tokens of these sequences, [tokens, width]."""
        if missing := [i for i in sequences.tolist() if i not in self._kept]:
            mask = self.calibration.mask[missing]
            hidden = last_hidden(self.teacher, self.calibration.tokens[missing], mask)
            found = {i: rows[m.to(rows.device)] for i, rows, m in zip(missing, hidden, mask, strict=True)}
            size = sum(rows.numel() * rows.element_size() for rows in found.values())
            if self._kept_bytes + size <= _CACHE_BYTES:
                self._kept |= found
                self._kept_bytes += size
        else:
            found = {}
        return torch.cat([self._kept[i] if i in self._kept else found[i] for i in sequences.tolist()])
