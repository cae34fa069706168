"""Running the modules of one block on calibration text, for methods that measure what a module puts out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from trimtab.models.calibration import BlockStream
from trimtab.models.captured_call import CapturedCall
from trimtab.models.statistics import Need, Stats
from trimtab.models.views import BlockView, ModelView


@dataclass(frozen=True, slots=True)
class BlockRun:
    """The calibration text in front of one block.

    view      of the model
    stream    stands in front of `block`; a method only reads from it
    seed      for whatever a method draws
    """

    view: ModelView
    block: BlockView
    stream: BlockStream
    seed: int

    def gather(self, needs: Mapping[str, Iterable[Need]], *, first: int = 0) -> dict[str, Stats]:
        """Statistics of sites of the block as it is now, from position `first` on: site -> what is wanted of it."""
        return self.stream.gather(self.block, needs, first=first)

    def capture(self, module: nn.Module, *, sequences: int) -> list[CapturedCall]:
        """What `module`, one of the block, is called with on the first `sequences` sequences, and what it puts out.

        One call for each chunk of sequences. `call.run()` computes the output anew, with the weights of that moment.
        """
        return self.stream.capture(self.block, module, sequences=sequences)
