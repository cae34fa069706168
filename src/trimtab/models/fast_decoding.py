"""Decoding at the speed of memory with compressed weights: `fast_decoding(model)`."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from trimtab.core.errors import TrimtabError
from trimtab.models.attention import use_backend
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.families import family_of
from trimtab.models.fast_block import use_fast_block
from trimtab.models.fast_linear import use_fast_linear
from trimtab.models.shared_input import SharedInput
from trimtab.models.views import ModelView

log = logging.getLogger("trimtab.models")


def fast_decoding(model: PreTrainedModel) -> None:
    """Let compressed layers with one input share a call, dense 16-bit ones read memory fast (`use_fast_linear`), and on
    a processor attention take one query the fast way (`use_backend`, in place of transformers' "sdpa").

    Modules, state dictionaries, hooks and saving stay as they are; copies of the model share nothing until this is
    called for them. `compress` and loading a checkpoint call it. Calling it again finds the layers anew, after some
    were replaced. A model of an unknown family decodes layer by layer.
    """
    use_fast_linear(model)
    try:
        if model.device.type == "cpu" and model.config.get_text_config()._attn_implementation == "sdpa":
            use_backend(model)
        blocks, family = ModelView.of(model).blocks, family_of(model)
    except TrimtabError as error:
        log.info("decoding stays as it is: %s", error)
        return
    for block in blocks:
        for site in block.sites.values():
            layers = [linear.module for linear in site if isinstance(linear.module, CompressedLinear)]
            shared = SharedInput(layers) if len(layers) > 1 else None
            for layer in layers:
                layer.share(shared)
        if reason := use_fast_block(block, family):
            log.info("%s decodes module by module: %s", block.name, reason)
