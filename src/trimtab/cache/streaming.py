"""Keep the first few tokens and a window of recent ones, at positions inside the cache: endless text, constant memory.

Paper: Guangxuan Xiao, Yuandong Tian, Beidi Chen, Song Han, Mike Lewis, "Efficient Streaming Language Models with
Attention Sinks", ICLR 2024, arXiv:2309.17453.

Softmax has to put its mass somewhere, and trained models put it on the first tokens, whatever these say. A window
that drops them breaks the model; the window and the first `sinks` tokens together do not. The position of a key is
its *index in the cache*, not in the text, so positions never exceed sinks + window: keys are stored before rotary
embedding and rotated where they are read, and the query is moved to the end of the cache. A step attends to what the
cache holds and its own token, then evicts down to sinks + window. What has left the window cannot be recalled.

A prompt longer than the cache attends to itself exactly and is evicted afterwards; the paper leaves this open. Feed
it in chunks to have eviction in between. With `sinks=0` this is window attention, the baseline that breaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.cache.base import CacheMethod, Fitted, LayerShape
from trimtab.core.errors import ConfigError
from trimtab.models.segments import HeadPlan, TensorPlan
from trimtab.tensors.kv.codec import KVCodec

__all__ = ["Streaming"]


@dataclass(frozen=True, kw_only=True)
class Streaming(CacheMethod):
    """Options of StreamingLLM.

    sinks    first tokens that are kept for ever; 4 serve models that were not trained with a sink token, 0 to none
    window   most recent tokens that are kept
    """

    sinks: int = 4
    window: int = 1020

    def check(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ConfigError(f"streaming: sinks={self.sinks} and window={self.window} must be >= 0 and >= 1.")

    def head_plans(self, layer: LayerShape, fitted: Fitted) -> tuple[HeadPlan, ...]:
        plan = TensorPlan(codec=KVCodec(bits=0), block=1, window=self.window)
        return (
            HeadPlan(
                heads=layer.all_heads,
                keys=plan,
                values=plan,
                sinks=self.sinks,
                recent=self.window,
                positions="cache",
            ),
        )
