"""Contrast the last layer with an early one: what only late layers know counts for more.

Paper: Yung-Sung Chuang, Yujia Xie, Hongyin Luo, Yoon Kim, James Glass, Pengcheng He, "DoLa: Decoding by Contrasting
Layers Improves Factuality in Large Language Models", ICLR 2024, arXiv:2309.03883.

With z_N the logits of the last block and z_j what the output head makes of block j, a token x that the last block
finds plausible, q_N(x) >= relative_top max q_N, gets the score

    F(x) = log softmax(z_N)(x) - log softmax(z_M)(x),      M = argmax over candidates j of JSD(q_N, q_j)

and all other tokens none; softmax(F) is what is decoded. It comes before repetition penalty, other logits processors,
temperature and the like, and goes with any way of drafting: what is then decoded exactly is softmax(F).

Departures: M is chosen for each text and position by the Jensen-Shannon divergence, as the paper has it. The authors'
code chooses one layer for a whole batch, with the arguments of the divergence exchanged (divergence="official" does
that too, but for each text on its own). A family's own last step, such as Gemma's softcap, is applied to z_N only.
The repetition penalty of 1.2 that the authors use with this method is the caller's, in `Sampling`.

Cost: one more product with the output head per candidate, in one call, and J + 1 softmaxes.

When it fails: where the first token of an answer is not plausible, no contrast brings it back; and late layers know
no better than early ones what a prompt says, so answers that must follow a context against memory do not gain.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from trimtab.core.errors import ConfigError
from trimtab.decoding._distribution import LogitsTransform
from trimtab.decoding._transforms.dola import Bucket, Divergence, DolaTransform, bucket
from trimtab.decoding.base import DecodingMethod
from trimtab.models.early_exits import Exit
from trimtab.models.views import ModelView

__all__ = ["Dola"]


@dataclass(frozen=True, kw_only=True)
class Dola(DecodingMethod):
    """Decoding by contrasting layers.

    layers          candidates: the bucket "low" (the authors', for long answers that reason) or "high" (for short
                    ones), or block numbers (0: the embeddings); a single one is the static variant
    relative_top    a token is plausible with this share of the likeliest one's probability; 0: all are
    divergence      how the layer is chosen: "true" Jensen-Shannon, or "official" as in the authors' code
    norm_premature  put early layers through the final norm before the head; the authors do not
    """

    layers: Bucket | tuple[int, ...] = "high"
    relative_top: float = 0.1
    divergence: Divergence = "true"
    norm_premature: bool = False

    def check(self) -> None:
        if not 0 <= self.relative_top <= 1:
            raise ConfigError(f"relative_top is {self.relative_top}; it is a share, from 0 to 1.")
        if not self.layers:
            raise ConfigError("layers is empty; name at least one, or a bucket: low, high.")

    def transforms(self, model: PreTrainedModel) -> tuple[LogitsTransform, ...]:
        exits = [Exit(layer, self.norm_premature) for layer in self.candidates(model)]
        return (DolaTransform(exits, self.relative_top, self.divergence),)

    def candidates(self, model: PreTrainedModel) -> tuple[int, ...]:
        """Blocks to choose from. Raises ConfigError for one that the model does not have before its last."""
        blocks = len(ModelView.of(model).blocks)
        if isinstance(self.layers, str):
            return bucket(self.layers, blocks, tied=bool(model.config.get_text_config().tie_word_embeddings))
        if outside := [layer for layer in self.layers if not 0 <= layer < blocks]:
            raise ConfigError(
                f"layers {outside} are not before the last of {blocks} blocks; early ones are 0 to {blocks - 1}."
            )
        return tuple(sorted(set(self.layers)))
