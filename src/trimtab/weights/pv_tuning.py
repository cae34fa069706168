"""Tune codes and numbers of a compressed model together, on how far its predictions are from the original's.

Paper: Malinovskii, Mazur, Ilin, Kuznedelev, Burlachenko, Yi, Alistarh, Richtarik, "PV-Tuning: Beyond Straight-Through
Estimation for Extreme LLM Compression", NeurIPS 2024, arXiv:2405.14852.

Another method (`base`) compresses the model; bytes and format stay as it left them. Then, for `steps` batches of the
calibration text, with the loss KL(original || compressed) per token and G = dL/dW of every matrix from one backward:

    P   scales, zero points, codebooks ... move along their gradients, which are those of W(codes, numbers) under G
    V   U = buffer - code_lr |W| Adam(G) / |Adam(G)|                 beta1 = 0, beta2 = 0.95
        S = the ceil(tau n) code groups with the largest |U - W|      W: old codes, new numbers
        codes of S move to U; in order of |U - W|, until the changes together are rho |W| long
        buffer = delta W + (1 - delta) U

A step along the whole gradient is too short for any code to change; on a few codes at once it may be long, for there
the loss is smooth enough. Modes:

    pv_ste        delta = 0, tau, rho: the step adds up in the buffer, few codes change at a time (recommended there)
    subspace      delta = 1, tau, rho; a chosen group takes its best *other* code if the nearest is the one it has
    ste           delta = 0, tau = 1, no rho: straight-through estimation
    naive         delta = 1, tau = 1, no rho: a gradient step, then the nearest codes; known to fail
    continuous    P only

A part of the calibration text, its end, is neither trained on nor shown to the base: every `check_every` steps the
model, as it would be stored, is measured there, and the best so far is what remains, the base's own result included. So
the loss of what is kept never rises.

Departures from the authors' code:
  - Both steps are relative to the norm of what they move (LAMB without its clipping), so that one pair of rates serves
    scales, zero points and codebooks of any size.
  - Rates fall linearly to zero and are lower where rounding errors are; and they, tau and rho are higher (theirs: 3e-4,
    3e-3, 0.01 and 0.01): our runs are hundreds of batches of 2,048 tokens, theirs of a million each. In small matrices
    rho = 0.01 lets one code change per step. The defaults were chosen on calibration text of `ref-mini`: at 2 bits in
    runs of 50 steps, what is left of them at 3 bits in runs of 100 and 200.
  - The subspace is the top groups only, not sampled; embeddings and head are not trained, norms if `norms` asks.
  - Any LinearMethod is a base, so grids and NormalFloat levels are tuned as codebooks are.

Cost: a forward of the original and a forward and backward of the compressed model for each batch; about 16 bytes a
weight beside the two models. Decoding is as fast, and files as large, as the base's.
When it fails: little calibration text (it learns that text: the held-out part then stops it early); 4 bits and more,
where rounding to the best single layers leaves little to gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from trimtab.core import progress as bars
from trimtab.core.errors import ConfigError
from trimtab.core.registry import method_class
from trimtab.weights.base import LinearMethod, Notes, WeightMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimtab.models.calibration_set import CalibrationSet
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import LinearView
    from trimtab.tensors.compressed import CompressedTensor
    from trimtab.weights._pv_step import CodeRules
    from trimtab.weights._tuning import Tuning

__all__ = ["PvTuning"]

Mode = Literal["pv_ste", "subspace", "ste", "naive", "continuous"]


@dataclass(frozen=True, kw_only=True)
class PvTuning(LinearMethod):
    """PV-Tuning of what another method has made.

    base               the method that compresses: gptq, rtn, nf, hqq, vq or any other that takes one linear at a time
    bits               of the base
    base_options       its other options, as `name=value` between commas: `group_size=32,act_order=true`. For grids,
                       `zero_dtype=float16` makes zero points tunable too, at 8 bits more per group
    mode               see above
    steps              batches
    batch_tokens       tokens in a batch (at least one sequence)
    lr                 relative step of scales, zero points, codebooks, norms; falls linearly to zero. This and the next
                       two are for 2 bits, and a third of it for every further bit: rounding errors are smaller
    code_lr            relative step of the weights that codes follow; likewise
    trust_ratio        rho, the length of the changes of codes in one step, relative to the matrix
    max_code_change    tau, the share of code groups that may change in one step of a matrix
    norms              train the norms of the blocks and the last one as well
    held_out           share of the calibration sequences to choose the best state by
    check_every        steps between two measurements on them
    """

    base: str = "gptq"
    bits: Literal[2, 3, 4, 8] = 4
    base_options: tuple[str, ...] = ()
    mode: Mode = "pv_ste"
    steps: int = 200
    batch_tokens: int = 2048
    lr: float = 1e-2
    code_lr: float = 0.05
    trust_ratio: float = 0.3
    max_code_change: float = 0.05
    norms: bool = False
    held_out: float = 0.125
    check_every: int = 10

    def check(self) -> None:
        for name in ("steps", "batch_tokens", "check_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"PvTuning: option {name}={getattr(self, name)} must be at least 1.")
        for name in ("lr", "code_lr", "max_code_change", "trust_ratio", "held_out"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"PvTuning: option {name}={getattr(self, name)} must be above 0 and at most 1.")
        if wrong := [option for option in self.base_options if "=" not in option]:
            raise ConfigError(f"PvTuning: option base_options holds {wrong[0]!r}; write name=value, between commas.")
        base = self.method
        if not isinstance(base, LinearMethod) or base.tunes or type(base).prepare is not WeightMethod.prepare:
            raise ConfigError(
                f"PvTuning: option base={self.base!r} must be a method that compresses one linear at a time and "
                "neither plans nor tunes, such as gptq, rtn, nf, hqq or vq."
            )

    @cached_property
    def method(self) -> WeightMethod:
        """The base with its options. Raises ConfigError for those that it does not have."""
        options = dict(option.split("=", 1) for option in self.base_options)
        built = method_class(self.base).from_options({"bits": self.bits, **options})  # type: ignore[attr-defined]
        return built  # type: ignore[no-any-return]

    @property
    def _linear_method(self) -> LinearMethod:
        assert isinstance(self.method, LinearMethod)
        return self.method

    @property
    def needs(self) -> frozenset[Need]:
        return self.method.needs

    @property
    def needs_text(self) -> bool:
        return True

    def statistics_text(self, calibration: CalibrationSet) -> CalibrationSet:
        """Without the end, by which the best state is chosen: a base that knew it would look better than it is."""
        return calibration.take(calibration.split(self.held_out)[0])

    @property
    def tunes(self) -> bool:
        return True

    def check_linear(self, linear: LinearView) -> None:
        self.method.check_linear(linear)

    def check_targets(self, linears: Sequence[LinearView]) -> None:
        self.method.check_targets(linears)

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        return self._linear_method.compress(linear, stats)

    @property
    def rules(self) -> CodeRules | None:
        """What the mode lets codes do; None: nothing."""
        from trimtab.weights._pv_step import CodeRules

        tau, rho = self.max_code_change, self.trust_ratio * self._scale
        return {
            "pv_ste": CodeRules(tau, rho),
            "subspace": CodeRules(tau, rho, decay=1.0, force=True),
            "ste": CodeRules(),
            "naive": CodeRules(decay=1.0),
            "continuous": None,
        }[self.mode]

    @property
    def _scale(self) -> float:
        return 3.0 ** (2 - self.bits)

    def tune(self, tuning: Tuning) -> Notes:
        """P and V steps; the notes have the loss on held-out calibration text before and after, nats per token."""
        from trimtab.weights._distillation import Distillation
        from trimtab.weights._pv_step import CodeStepper, NumberStepper
        from trimtab.weights._student import Student

        assert tuning.calibration is not None
        norms = _norms(tuning) if self.norms else ()
        loss = Distillation(tuning.model, tuning.teacher, tuning.calibration)
        train, held = tuning.calibration.split(self.held_out)
        batch = max(1, self.batch_tokens // tuning.calibration.length)
        batches = loss.batches(train, batch, tuning.seed)
        changes = 0
        with Student(tuning.model, norms) as student:
            numbers = NumberStepper(student.numbers())
            codes = [CodeStepper(layer, self.rules) for layer in student.layers] if self.rules else []
            best = student.snapshot()
            student.load(best)
            trace = [loss.value(held)]
            kept = 0
            student.refresh()
            bar = bars.progress("tuning", self.steps, shown=tuning.progress)
            with bar as advance:
                for step in range(1, self.steps + 1):
                    rate = self._scale * (1 - (step - 1) / self.steps)
                    student.zero_gradients()
                    loss.backward(next(batches))
                    student.pull_back()
                    numbers.step(self.lr * rate)
                    changes += sum(stepper.step(self.code_lr * rate) for stepper in codes)
                    if step % self.check_every == 0 or step == self.steps:
                        candidate = student.snapshot()
                        student.load(candidate)
                        trace.append(loss.value(held))
                        if trace[-1] < trace[0] and trace[-1] == min(trace):
                            best, kept = candidate, step
                    student.refresh()
                    advance(f"KL {min(trace):.4f}")
        best.install(tuning.model)
        if kept:
            tuning.record.changed_dense.extend(norms)
        tuning.record.metrics["tuning_trace"] = trace
        return {"kl_before": trace[0], "kl_after": min(trace), "kept_step": kept, "code_changes": changes}


def _norms(tuning: Tuning) -> tuple[str, ...]:
    """Names of the weights of the norms in front of each attention and MLP, and of the last."""
    from trimtab.models.views import ModelView

    view = ModelView.of(tuning.model)
    modules = [m for block in view.blocks for m in (block.attention.norm, block.mlp.norm)] + [view.final_norm]
    wanted = {id(module) for module in modules}
    return tuple(f"{name}.weight" for name, module in tuning.model.named_modules() if id(module) in wanted)
