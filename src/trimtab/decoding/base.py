"""The contract of the decoding room: how tokens are drafted, which distribution is decoded, how a text is searched for.

One round is the same for all methods (`_loop.py`): a proposer drafts a tree, the target reads it in one forward pass,
transforms turn its logits into the distribution that is decoded, a rule accepts a branch of the draft, and the caches
keep that branch. A method supplies one or more of these parts, so methods that supply different ones combine:

    decoder = Decoder(model, [Dola(), RsdS(draft="ref-mini")])
    decoder.generate(prompts, Sampling(temperature=0.7))
    model.generate(ids, custom_generate=RsdS(draft="ref-mini"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.core.errors import ConfigError
from trimtab.core.method import Method

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trimtab.decoding._decoder import Decoder
    from trimtab.decoding._distribution import Distribution, LogitsTransform
    from trimtab.decoding._loop import Generation
    from trimtab.decoding._proposers.base import Proposer
    from trimtab.decoding._reader import Reader
    from trimtab.decoding._rules.base import AcceptanceRule
    from trimtab.decoding._sampling import Sampling


@dataclass(frozen=True)
class DraftSetting:
    """What a drafting method is built from.

    sampling      of this generation
    new_reader    method's `draft` -> a reader of that model for so many texts
    distribution  (temperature) -> that of the draft's logits, with the other settings of `sampling`
    positions     that the target has; None: no limit
    """

    sampling: Sampling
    new_reader: Callable[[str], Callable[[int], Reader]]
    distribution: Callable[[float], Distribution]
    positions: int | None = None

    def drawn(self, temperature: float | None, *, greedy: float) -> Distribution:
        """Of a draft that takes several draws: at this temperature or, for None, the target's, or `greedy` where that
        is 0. At 0 all draws would be the same."""
        return self.distribution(temperature or self.sampling.temperature or greedy)

    def check_depth(self, depth: int) -> None:
        """Raise ConfigError for drafts that no text of the model could hold."""
        if self.positions is not None and depth >= self.positions:
            raise ConfigError(f"depth={depth} does not fit the model's {self.positions} positions; draft fewer tokens.")


@dataclass(frozen=True)
class Drafting:
    """A proposer and the rule that accepts its drafts."""

    proposer: Proposer
    rule: AcceptanceRule


@dataclass(frozen=True, kw_only=True)
class DecodingMethod(Method):
    """A way to decode. One subclass per file; it overrides the parts that its paper is about.

    Called, it is a `custom_generate` of transformers.
    """

    room: ClassVar[str] = "decoding"

    @property
    def lossless(self) -> bool:
        """Whether the tokens follow the distribution that the model and the transforms define."""
        return True

    def transforms(self, model: PreTrainedModel) -> tuple[LogitsTransform, ...]:
        """Steps from the model's logits to the distribution that is decoded, before temperature and the like."""
        return ()

    def companions(self, named: Callable[[str], PreTrainedModel]) -> dict[str, PreTrainedModel]:
        """Other models that read the same tokens: their logits are in `Rows.others`.

        named   what an option says -> that model; refuses one with other tokens
        """
        return {}

    def drafting(self, setting: DraftSetting) -> Drafting | None:
        """How tokens are drafted and accepted; None: not at all, every token is the target's own."""
        return None

    def search(self, decoder: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Generation | None:
        """Write the texts in a way of its own, with the decoder's loop for the steps; None: the loop alone."""
        return None

    def check_positive(self, *names: str) -> None:
        """Raise ConfigError for one of these options that is below 1, or empty, or holds such a number."""
        for name in names:
            value = getattr(self, name)
            if not value or min(value if isinstance(value, tuple) else (value,)) < 1:
                raise ConfigError(f"{type(self).__name__}: {name}={value!r}; it must be at least 1.")

    def __call__(self, model: PreTrainedModel, input_ids: Tensor, **arguments: Any) -> Tensor:
        """For `model.generate(..., custom_generate=method)`: token ids [R, length], prompts included."""
        from trimtab.decoding._custom_generate import custom_generate

        return custom_generate([self], model, input_ids, **arguments)
