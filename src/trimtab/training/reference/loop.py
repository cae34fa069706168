"""The training loop: resumable at any point, with the same result as without interruption.

A run is a directory: ``state.pt`` (parameters, optimiser, where we are), ``log.jsonl`` (one line per
ten steps). The rows of a step depend on the step alone (see :mod:`.data`), so nothing else has to be
remembered.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from trimtab.core.progress import progress
from trimtab.training.reference.data import Rows
from trimtab.training.reference.model import TrainingLoss
from trimtab.training.reference.optim import Optimizer
from trimtab.training.reference.stages import Stage

WARM_UP_STEPS = 50
LOG_EVERY = 10
CLIP_NORM = 1.0
SMOOTHING = 0.9


@dataclass
class Place:
    """Where a run is: the next stage and step, what was seen, the smoothed loss of the stage.

    since  steps since the optimiser started afresh.
    """

    stage: int = 0
    step: int = 0
    since: int = 0
    tokens: int = 0
    smoothed: float | None = None
    seconds: float = 0.0


class Run:
    """One training run in a directory; making it again continues where it stopped."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        stages: Sequence[Stage],
        rows: Rows,
        out: Path,
        *,
        device: str = "cpu",
        compiled: bool = True,
        save_every: int = 100,
    ) -> None:
        self.model = model.to(device)  # type: ignore[arg-type]
        self.stages = stages
        self.rows = rows
        self.out = out
        self.device = device
        self.save_every = save_every
        self.place = Place()
        self.optimizer = Optimizer(model, muon=stages[0].muon)
        self.loss = TrainingLoss(model, compiled)
        out.mkdir(parents=True, exist_ok=True)
        if (out / "state.pt").exists():
            self._load()

    def train(self) -> None:
        """Run all stages to the end."""
        for index in range(self.place.stage, len(self.stages)):
            stage = self.stages[index]
            if self.place.stage != index:
                self._enter(index)
            with progress(stage.name, stage.steps) as advance:
                for _ in range(self.place.step):
                    advance("")
                while self.place.step < stage.steps and not self._converged(stage):
                    loss = self.step(stage)
                    advance(f"loss {loss:.3f}")
                    if self.place.step % self.save_every == 0:
                        self.save()
        self.place.stage = len(self.stages)
        self.save()

    def _enter(self, index: int) -> None:
        if self.stages[index].muon != self.stages[index - 1].muon:
            self.optimizer = Optimizer(self.model, muon=self.stages[index].muon)
            self.place.since = 0
        self.place.stage, self.place.step, self.place.smoothed = index, 0, None

    def _converged(self, stage: Stage) -> bool:
        smoothed = self.place.smoothed
        return smoothed is not None and self.place.step > WARM_UP_STEPS and smoothed < stage.until_loss

    def step(self, stage: Stage) -> float:
        """One optimiser step; returns the loss before it."""
        place, started = self.place, time.monotonic()
        shape = stage.shape(place.step)
        batch = self.rows.batch(stage.name, place.step, shape, stage.mixture, stage.options)
        ids, weights, positions = (part.to(self.device) for part in batch)
        loss = self.loss(ids, weights, positions)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        first, last = stage.rate
        rate = first + (last - first) * place.step / stage.steps
        self.optimizer.step(rate * min(1.0, (place.since + 1) / WARM_UP_STEPS))
        value = loss.item()
        if not value < float("inf"):
            raise FloatingPointError(f"loss is {value} in stage {stage.name}, step {place.step}")
        before = value if place.smoothed is None else place.smoothed
        place.smoothed = SMOOTHING * before + (1 - SMOOTHING) * value
        place.step += 1
        place.since += 1
        place.tokens += shape[0] * shape[1]
        place.seconds += time.monotonic() - started
        if place.step % LOG_EVERY == 0:
            self._log(stage, value, float(norm), rate)
        return value

    def _log(self, stage: Stage, loss: float, norm: float, rate: float) -> None:
        line = {
            "stage": stage.name,
            "step": self.place.step,
            "tokens": self.place.tokens,
            "loss": round(loss, 4),
            "gradient_norm": round(norm, 3),
            "rate": round(rate, 8),
            "seconds": round(self.place.seconds, 1),
        }
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write the state beside the old one, then put it in its place."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "place": vars(self.place),
        }
        temporary = self.out / "state.pt.partial"
        torch.save(state, temporary)
        os.replace(temporary, self.out / "state.pt")

    def _load(self) -> None:
        state: dict[str, Any] = torch.load(self.out / "state.pt", map_location=self.device, weights_only=True)
        self.place = Place(**state["place"])
        self.model.load_state_dict(state["model"])
        current = self.stages[min(self.place.stage, len(self.stages) - 1)]
        self.optimizer = Optimizer(self.model, muon=current.muon)
        self.optimizer.load_state_dict(state["optimizer"])
        self._forget_later_lines()

    def _forget_later_lines(self) -> None:
        """Drop log lines of steps after the saved state; they are going to be made again."""
        path = self.out / "log.jsonl"
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["tokens"] <= self.place.tokens]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
