"""Statistics of linear inputs over calibration text, block by block, with memory bounded by one block.

    calibration = CalibrationSet.from_text("corpus.txt", tokenizer)
    view = ModelView.of(model)
    stream = BlockStream(view, calibration)
    for block in view.blocks:
        statistics = stream.gather(block, {site: {"gram"} for site in block.sites}, advance=True)

The stream holds the hidden states of all sequences in front of one block. In *dense* mode a block is advanced through
while its statistics are gathered, before it is compressed, so all statistics are those of the original model; in
*sequential* mode it is compressed site by site, each site seeing what the compressed earlier ones produce, and then
advanced through.

Memory beyond the model: the hidden states (tokens x width in the model's dtype, on the CPU), the activations of one
chunk in one block, and the statistics of the sites gathered at once (a Gram matrix is in^2 float32). It does not grow
with depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.core.errors import DataError, NumericsError
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.captured_call import CapturedCall, first_output
from trimtab.models.statistics import Need, SiteAccumulator, Stats
from trimtab.models.views import BlockView, ModelView

__all__ = ["BlockStream", "CalibrationSet", "gather_dense"]

CHUNK_TOKENS = 4096


class _Gathered(Exception):
    """A signal, not an error: the last wanted site of the block has been seen, the rest of it need not run."""


class BlockStream:
    """The hidden states of the calibration sequences in front of one block, and the means to run that block.

    A block is never called by hand. The model's own forward calls it, with every other block passing its input
    through, and its input replaced by the stored hidden states: whatever a family hands to its blocks (rotary tables,
    full or sliding masks, positions) is right without this module knowing of it.

    Raises DataError if the sequences are longer than the model's context.
    """

    def __init__(
        self, view: ModelView, calibration: CalibrationSet, *, seed: int = 0, chunk_tokens: int = CHUNK_TOKENS
    ) -> None:
        self.calibration = calibration
        self.seed = seed
        # modules rather than the view, which would keep every linear alive after it is replaced
        self._model = view.model
        self._blocks = tuple(block.module for block in view.blocks)
        context = getattr(view.model.config, "max_position_embeddings", None)
        if context is not None and calibration.length > context:
            raise DataError(
                f"calibration sequences of {calibration.length} tokens are longer than the model's context of "
                f"{context}. Make them with length={context} or less."
            )
        self._chunk = max(1, chunk_tokens // calibration.length)
        # None: in front of the first block, whose input the model makes
        self._hidden: list[Tensor | None] = [None] * self._chunks

    def gather(
        self, block: BlockView, needs: Mapping[str, Iterable[Need]], *, advance: bool = False, first: int = 0
    ) -> dict[str, Stats]:
        """Statistics of sites of `block`, the next block of the stream; with `advance` moves to the one after it.

        `needs` is site -> statistics; positions before `first` do not count in them. Without `advance` the block runs
        as far as the last of these sites. Raises NumericsError naming the module whose input is NaN or infinite.
        """
        wanted = {site: frozenset(n) for site, n in needs.items() if n}
        members = {site: linears[0] for site, linears in block.sites.items() if site in wanted}
        accumulators = {
            site: SiteAccumulator(site, linear.in_features, wanted[site], seed=self.seed)
            for site, linear in members.items()
        }
        last = list(members)[-1] if members else None
        mask = self.calibration.mask

        def take(site: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
            counted = mask & (torch.arange(mask.shape[1]) >= first)
            accumulators[site].update(arguments[0], counted, module=members[site].name)
            if site == last and not advance:
                raise _Gathered

        with ExitStack() as hooks:
            for site, linear in members.items():
                handle = linear.module.register_forward_pre_hook(
                    lambda module, arguments, site=site: take(site, module, arguments)
                )
                hooks.callback(handle.remove)
            for index in range(self._chunks if members or advance else 0):
                mask = self.calibration.mask[self._rows(index)]
                output = self._run(block, index)
                if advance:
                    self._hidden[index] = self._checked(output, mask, block)  # frees the chunk's input
        return {site: accumulator.stats() for site, accumulator in accumulators.items()}

    def capture(self, block: BlockView, module: nn.Module, *, sequences: int) -> list[CapturedCall]:
        """The calls of `module`, inside `block` (or the block itself), on the first `sequences` sequences or more.

        `block` is the next block of the stream, which does not move. Whole chunks are run, and each gives one call; a
        module that is called several times in one forward pass gives as many.
        """
        calls: list[CapturedCall] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if module is block.module and stored is not None:  # hooks see what `_run` replaces
                args = (stored.to(args[0].device), *args[1:])
            calls.append(CapturedCall(module, args, kwargs, first_output(output), mask))

        handle = module.register_forward_hook(keep, with_kwargs=True)
        try:
            for index in range(-(-min(sequences, len(self.calibration.tokens)) // self._chunk)):
                mask, stored = self.calibration.mask[self._rows(index)], self._hidden[index]
                self._run(block, index)
        finally:
            handle.remove()
        return calls

    def advance(self, block: BlockView) -> None:
        """Run all sequences through `block`, the next block, as it is now, to stand in front of the one after it.

        Raises NumericsError naming the block if its output is NaN or infinite where there is no padding.
        """
        self.gather(block, {}, advance=True)

    def hidden(self, index: int) -> Tensor:
        """Hidden states [sequences, length, width] of chunk `index`, in front of the block the stream has come to."""
        hidden = self._hidden[index]
        assert hidden is not None, "in front of the first block: the model makes its input"
        return hidden

    @staticmethod
    def _checked(output: Tensor | None, mask: Tensor, block: BlockView) -> Tensor:
        assert output is not None
        broken = ~torch.isfinite(output[mask])
        if bool(broken.any()):
            raise NumericsError(
                f"block {block.name} puts out {int(broken.sum())} NaN or infinite values on the calibration text. "
                "Check its weights, or load the model in a wider dtype (float32)."
            )
        return output

    @property
    def _chunks(self) -> int:
        return -(-len(self.calibration.tokens) // self._chunk)

    def _rows(self, index: int) -> slice:
        return slice(index * self._chunk, (index + 1) * self._chunk)

    def _run(self, block: BlockView, index: int) -> Tensor | None:
        """Run chunk `index` through `block`: its output [sequences, length, width] on the CPU; None if cut short."""
        stored = self._hidden[index]
        result: Tensor | None = None

        def substitute(forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal result
            if stored is not None:
                hidden = stored.to(hidden.device)
            try:
                output = forward(hidden, *args, **kwargs)
            except _Gathered:
                return hidden
            result = first_output(output).cpu()
            return output

        with _substituted(self._blocks, block.module, substitute):
            self._forward(self._rows(index))
        return result

    def _forward(self, rows: slice) -> None:
        run_blocks(self._model, self.calibration, rows)


def run_blocks(model: PreTrainedModel, calibration: CalibrationSet, rows: slice) -> None:
    """Run the model without its output head on some sequences, in evaluation mode and without gradients."""
    device = next(model.get_input_embeddings().parameters()).device
    mask = calibration.mask[rows]
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            model.base_model(
                input_ids=calibration.tokens[rows].to(device),
                attention_mask=None if bool(mask.all()) else mask.to(device=device, dtype=torch.int64),
                use_cache=False,
            )
    finally:
        model.train(training)


@contextmanager
def _substituted(blocks: Iterable[nn.Module], block: nn.Module, substitute: Callable[..., Any]) -> Iterator[None]:
    """Within: `block` runs through `substitute(its forward, ...)`; every other block passes its input through."""

    def pass_through(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    own_forward = block.forward
    try:
        for other in blocks:
            other.__dict__["forward"] = pass_through
        block.__dict__["forward"] = lambda *args, **kwargs: substitute(own_forward, *args, **kwargs)
        yield
    finally:
        for other in blocks:
            other.__dict__.pop("forward", None)


def gather_dense(
    view: ModelView,
    calibration: CalibrationSet,
    needs: Mapping[str, Iterable[Need]],
    *,
    seed: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Iterator[dict[str, Stats]]:
    """Statistics of the model as it is, one block after another: a single pass that serves several methods.

    `needs` is site -> statistics. Yields site -> Stats of each block in turn and holds no more than one block's; pass
    the union of them to `statistics_file.save_statistics` to keep them.
    """
    stream = BlockStream(view, calibration, seed=seed, chunk_tokens=chunk_tokens)
    for block in view.blocks:
        wanted = {site: needs[site] for site in block.sites if site in needs}
        yield stream.gather(block, wanted, advance=block is not view.blocks[-1])
