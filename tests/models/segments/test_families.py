"""What a model computes with a cache is what it computes without: all families, paddings, windows, backends."""

from __future__ import annotations

import pytest
import torch

from trimtab.models.random import random_model

from .plans import WITHOUT_ROPE, eager_twin, feed, new_cache, tokens

LENGTH = 58
CHUNKS = [21, 1, 1, 9, 1, 25]


def padding(side: str) -> torch.Tensor:
    mask = torch.ones((3, LENGTH), dtype=torch.long)
    if side == "left":
        mask[0, :5], mask[2, :22] = 0, 0
    elif side == "right":
        mask[0, -6:], mask[2, -30:] = 0, 0
    return mask


@pytest.mark.parametrize(("side", "pre_rope"), [("none", False), ("left", False), ("left", True), ("right", True)])
def test_cached_logits_are_the_uncached_ones(family: str, side: str, pre_rope: bool) -> None:
    pre_rope = pre_rope and family not in WITHOUT_ROPE
    ids, mask = tokens(3, LENGTH), padding(side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    arguments = {} if side == "none" else {"attention_mask": mask, "position_ids": positions}
    wanted = eager_twin(family)(ids, **arguments).logits
    model = random_model(family)
    found = feed(model, new_cache(model, pre_rope=pre_rope), ids, CHUNKS, **arguments)
    assert torch.isfinite(found).all()
    shown = mask.bool()
    torch.testing.assert_close(found[shown], wanted[shown], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_backend_and_dense_tensors_agree(family: str, implementation: str) -> None:
    if family == "gemma2":  # for which transformers has nothing else
        implementation = "eager"
    ids, model = tokens(2, 90), random_model(family)
    for pre_rope in {False, implementation == "eager" and family not in WITHOUT_ROPE}:
        found = feed(model, new_cache(model, "kivi", pre_rope=pre_rope), ids, [40, 1, 1, 30, 1, 17])
        cache = new_cache(model, "kivi", pre_rope=pre_rope)
        model.set_attn_implementation(implementation)
        wanted = feed(model, cache, ids, [40, 1, 1, 30, 1, 17])
        model.set_attn_implementation("trimtab")
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_without_a_cache_the_backend_is_transformers_attention(family: str) -> None:
    ids, model = tokens(2, 40), random_model(family)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    new_cache(model)
    for arguments in ({}, {"attention_mask": mask}):
        wanted = eager_twin(family)(ids, **arguments).logits
        found = model(ids, use_cache=False, **arguments).logits
        shown = mask.bool() if arguments else torch.ones_like(mask).bool()
        torch.testing.assert_close(found[shown], wanted[shown], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_padding_leaves_no_trace(family: str) -> None:
    """Rows of a padded batch give what each gives alone, quantized; a row of padding alone gives numbers."""
    model = random_model(family)
    ids, mask = tokens(3, 70), torch.ones((3, 70), dtype=torch.long)
    mask[0, :13], mask[2, :] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    sizes = [44, 1, 1, 20, 4]
    cache = new_cache(model, "kivi")
    found = feed(model, cache, ids, sizes, attention_mask=mask, position_ids=positions)
    assert torch.isfinite(found).all()
    assert [cache.segment_layers[0].groups[0].tokens(row) for row in range(3)][2] == 0
    alone = feed(model, new_cache(model, "kivi"), ids[:1, 13:], [31, 1, 1, 20, 4])
    torch.testing.assert_close(found[:1, 13:], alone, atol=2e-5, rtol=1e-4)
    again = feed(model, new_cache(model, "kivi"), ids, sizes, attention_mask=mask, position_ids=positions)
    assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = random_model("llama", dtype=dtype)
    ids = tokens(2, 50)
    wanted = eager_twin("llama")(ids).logits
    found = feed(model, new_cache(model), ids, [30, 1, 1, 18]).float()
    assert (found - wanted).norm() / wanted.norm() < (0.02 if dtype == torch.float16 else 0.1)


def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it() -> None:
    model, ids = random_model("llama"), tokens(1, 60)
    cache = new_cache(model)
    with torch.inference_mode():
        first = feed(model, cache, ids[:, :45], [40, 5])
    with torch.enable_grad():
        second = model(ids[:, 45:], past_key_values=cache).logits
    wanted = eager_twin("llama")(ids).logits
    torch.testing.assert_close(torch.cat([first.clone(), second.detach()], 1), wanted, atol=2e-5, rtol=1e-4)
    assert not any(tensor.requires_grad for tensor in cache.tensors())
