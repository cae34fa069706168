"""DoLa: the contrast and the choice of a layer by hand, exact with drafts, early layers of every family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

import trimtab as tt
from trimtab.core.errors import ConfigError, NumericsError
from trimtab.decoding import Decoder, Sampling, Speculative
from trimtab.decoding._decoder import exact_cache
from trimtab.decoding._distribution import Distribution, Warp
from trimtab.decoding._reader import ModelReader, Rows
from trimtab.decoding._transforms.dola import Bucket, Divergence, DolaTransform, bucket, distances
from trimtab.decoding.dola import Dola
from trimtab.models.early_exits import Exit
from trimtab.models.random import ALL_FAMILIES, random_model
from trimtab.models.views import ModelView

EXITS = (Exit(1), Exit(2))
DIVERGENCES: tuple[Divergence, ...] = ("true", "official")
SAMPLED = Warp(Sampling(temperature=1.0))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(mature: Tensor, *early: Tensor) -> Rows:
    return Rows(mature, {Exit(layer + 1): own for layer, own in enumerate(early)})


def no_prefix(row: int) -> list[int]:
    raise AssertionError("DoLa looks at no text")


def contrast(found: Rows, **options: Any) -> Tensor:
    return DolaTransform(list(found.early), **options)(found.logits, found, no_prefix)


# The contrast.


def test_equal_layers_leave_plausible_tokens_alike() -> None:
    mature = drawn(3, 40)
    probs = contrast(rows(mature, mature)).softmax(-1)
    q = mature.softmax(-1)
    kept = q >= 0.1 * q.max(-1, keepdim=True).values
    assert not kept.all()
    torch.testing.assert_close(probs, kept / kept.sum(-1, keepdim=True))


@pytest.mark.parametrize("relative_top", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_implausible_tokens_are_impossible_and_the_likeliest_stays(relative_top: float) -> None:
    mature, early = drawn(20, 40), drawn(20, 40, seed=1)
    probs = contrast(rows(mature, early), relative_top=relative_top).softmax(-1)
    q = mature.softmax(-1)
    implausible = q < relative_top * q.max(-1, keepdim=True).values * (1 - 1e-6)
    assert bool((probs[implausible] == 0).all())
    assert bool((probs.gather(1, q.argmax(-1, keepdim=True)) > 0).all())
    assert bool(implausible.any()) == (relative_top > 0)


def test_the_early_layer_added_back_is_the_last_one() -> None:
    mature, early = drawn(5, 40), drawn(5, 40, seed=1)
    found = contrast(rows(mature, early))
    kept = found > -torch.inf
    torch.testing.assert_close((found + early.log_softmax(-1))[kept], mature.log_softmax(-1)[kept], rtol=0, atol=1e-6)


def test_three_tokens_by_hand() -> None:
    mature = torch.tensor([[0.6, 0.3, 0.1]])
    near, far = torch.tensor([[0.5, 0.4, 0.1]]), torch.tensor([[0.3, 0.1, 0.6]])
    found = contrast(rows(mature.log(), near.log(), far.log()), relative_top=0.5).exp()
    torch.testing.assert_close(found, torch.tensor([[2.0, 3.0, 0.0]]))  # against the far layer: 0.6 / 0.3, 0.3 / 0.1


# The choice of the layer.


def test_distances_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    m = [0.375, 0.375, 0.25]
    true = 0.5 * sum(a * math.log(a / c) for a, c in zip([0.5, 0.5], m, strict=False))
    true += 0.5 * sum(b * math.log(b / c) for b, c in zip([0.25, 0.25, 0.5], m, strict=True))
    assert float(distances(torch.stack([q, p])[:, None].log(), "true")) == pytest.approx(true, abs=1e-6)
    p = torch.tensor([0.5, 0.4, 0.1])
    m = [0.375, 0.325, 0.3]
    official = sum(
        c * (math.log(c / a) + math.log(c / b)) / 2
        for a, b, c in zip([0.5, 0.4, 0.1], [0.25, 0.25, 0.5], m, strict=True)
    )
    assert float(distances(torch.stack([q, p])[:, None].log(), "official")) == pytest.approx(official, abs=1e-6)


def test_the_two_divergences_may_choose_differently() -> None:
    """Seldom: the authors' arguments are exchanged, which weighs tails differently."""
    log_probs = drawn(3, 2000, 30).log_softmax(-1)
    chosen = [distances(log_probs, name).argmax(0) for name in DIVERGENCES]
    share = float((chosen[0] != chosen[1]).float().mean())
    assert 0 < share < 0.2


def test_layers_are_chosen_for_each_position_on_its_own() -> None:
    mature, one, two = drawn(6, 30), drawn(6, 30, seed=1), drawn(6, 30, seed=2)
    together = contrast(rows(mature, one, two))
    alone = [contrast(rows(mature[i : i + 1], one[i : i + 1], two[i : i + 1])) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)
    of_each = [contrast(rows(mature, early)) for early in (one, two)]
    from_first = [bool(torch.equal(together[i], of_each[0][i])) for i in range(6)]
    assert True in from_first
    assert False in from_first


def test_of_equal_layers_the_first_is_taken() -> None:
    mature, early = drawn(4, 30), drawn(4, 30, seed=1)
    transform = DolaTransform([Exit(5), Exit(2)])
    assert transform.exits == (Exit(2), Exit(5))
    marked = Rows(mature, {Exit(5): early, Exit(2): early})
    torch.testing.assert_close(transform(mature, marked, no_prefix), contrast(rows(mature, early)))


@pytest.mark.parametrize(
    ("name", "blocks", "tied", "wanted"),
    [
        ("low", 32, False, range(0, 16, 2)),
        ("high", 32, False, range(16, 32, 2)),
        ("low", 32, True, range(2, 16, 2)),
        ("low", 60, False, range(0, 20, 2)),
        ("high", 60, False, range(40, 60, 2)),
        ("low", 2, True, [1]),
        ("low", 4, True, [2]),
        ("high", 3, True, [1]),
        ("low", 8, True, [2]),
        ("high", 8, True, [4, 6]),
    ],
)
def test_buckets(name: Bucket, blocks: int, tied: bool, wanted: range | list[int]) -> None:
    assert bucket(name, blocks, tied=tied) == tuple(wanted)


# Early layers of models.


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("normalised", [False, True])
def test_an_exit_is_the_head_on_what_leaves_its_block(family: str, normalised: bool) -> None:
    """Caught by hooks on the blocks themselves; in a batch of texts of different lengths."""
    model = random_model(family, num_hidden_layers=3) if family != "gpt2" else random_model(family, n_layer=3)
    view = ModelView.of(model)
    left: dict[int, Tensor] = {}

    def entering(block: int) -> Any:
        return lambda module, args, kwargs: left.__setitem__(block, args[0] if args else kwargs["hidden_states"])

    hooks = [
        each.module.register_forward_pre_hook(entering(index), with_kwargs=True)
        for index, each in enumerate(view.blocks)
    ]
    exits = [Exit(block, normalised) for block in range(3)]
    texts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    reader = ModelReader(model, 2, exact_cache, exits)
    reader.prefill([[], []])
    found = reader.read(texts, [[-1, 0, 1, 2, 3], [-1, 0, 1]])
    for hook in hooks:
        hook.remove()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for place in exits:
            hidden = left[place.block]
            wanted = head(view.final_norm(hidden) if normalised else hidden)
            for row, text in enumerate(texts):
                torch.testing.assert_close(found[row].early[place], wanted[row, : len(text)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_rows_of_a_batch_are_those_of_single_texts(family: str) -> None:
    model = random_model(family)
    decoder = Decoder(model, [Dola(layers=(0, 1))])
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    sampling = Sampling(temperature=1.0, max_new_tokens=6)
    together = decoder.generate(prompts, sampling).tokens
    assert together[0] == decoder.generate(prompts[:1], sampling).tokens[0]
    greedy = Sampling(max_new_tokens=6)
    assert decoder.generate(prompts, greedy).tokens == [decoder.generate([p], greedy).tokens[0] for p in prompts]


# What is decoded. That it is DoLa's distribution, with all drafts, is in test_exactness.py.


@pytest.fixture(scope="module")
def mini() -> PreTrainedModel:
    return tt.load("ref-mini", dtype=torch.float32)


def test_greedy_is_the_same_with_and_without_drafts(mini: PreTrainedModel) -> None:
    tokenizer = tt.models.tokenizer_of(mini)
    texts = ["The old house by the river", "Review: The room", "Question: Where does"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    sampling = Sampling(max_new_tokens=24, repetition_penalty=1.2)
    dola = Dola(layers=(1, 2))
    drafted = Decoder(mini, [dola, Speculative(draft="self:4bit", depth=4)], adapt=False).generate(prompts, sampling)
    plain = Decoder(mini, [dola]).generate(prompts, sampling)
    assert drafted.tokens == plain.tokens
    assert sum(drafted.ledger.accepted_by_depth) > 0
    assert plain.tokens != Decoder(mini).generate(prompts, sampling).tokens


def test_other_processors_come_after_the_contrast(mini: PreTrainedModel) -> None:
    """One that adds to a score would be lost in a softmax of other logits; one that sees logits sees F."""
    seen: list[Tensor] = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            seen.append(scores)
            return scores

    ids = torch.tensor([[5, 6, 7]])
    mini.generate(ids, custom_generate=Dola(), max_new_tokens=2, do_sample=False, logits_processor=[Watch()])  # type: ignore[operator]
    assert all(bool((scores == -torch.inf).any()) for scores in seen)


# Bad input.


def test_refuses_layers_that_are_not_early(mini: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"layers \[3\] are not before the last of 3 blocks; early ones are 0 to 2"):
        Decoder(mini, [Dola(layers=(1, 3))]).generate([[5]], Sampling())
    with pytest.raises(ConfigError, match="layers 'low' are none of a model with 3 blocks and tied embeddings"):
        Decoder(mini, [Dola(layers="low")]).generate([[5]], Sampling())


def test_options_from_the_command_line() -> None:
    assert Dola.from_options({"layers": "4,6"}).layers == (4, 6)
    assert Dola.from_options({"layers": "4"}).layers == (4,)
    assert Dola.from_options({"layers": "low"}).layers == "low"


def test_nan_logits_are_an_error() -> None:
    broken = drawn(1, 30)
    broken[0, 3] = torch.nan
    found = rows(broken, drawn(1, 30, seed=1), drawn(1, 30, seed=2))
    with pytest.raises(NumericsError, match="NaN"):
        Distribution([DolaTransform(EXITS), SAMPLED])(found, no_prefix)
