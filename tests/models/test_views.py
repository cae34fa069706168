"""Views show the same thing for every family, checked against what the modules compute."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimtab.core.errors import ConfigError, TargetError
from trimtab.models.families import families
from trimtab.models.random import ALL_FAMILIES, random_model
from trimtab.models.views import SITE_ORDER, LinearView, ModelView, rows_by_head, rows_in_order


def record_inputs_and_outputs(
    model: PreTrainedModel, view: ModelView, tokens: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> object:
        return lambda module, args, output: seen.__setitem__(name, (args[0].detach(), output.detach()))

    handles = [linear.module.register_forward_hook(hook(linear.name)) for linear in view.linears]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def test_every_family_file_has_a_random_model() -> None:
    assert set(ALL_FAMILIES) == set(families())


def test_random_models_repeat_by_seed(family: str, tokens: Tensor) -> None:
    first, same, other = random_model(family, 1), random_model(family, 1), random_model(family, 2)
    with torch.no_grad():
        assert torch.equal(first(tokens).logits, same(tokens).logits)
        assert not torch.equal(first(tokens).logits, other(tokens).logits)
        assert 0.1 < float(first(tokens).logits.std()) < 50


def test_weight_times_input_is_the_layers_output(model: PreTrainedModel, tokens: Tensor) -> None:
    view = ModelView.of(model)
    seen = record_inputs_and_outputs(model, view, tokens)
    assert set(seen) == {linear.name for linear in view.linears}
    for linear in view.linears:
        given, made = seen[linear.name]
        assert linear.weight.shape == (linear.out_features, linear.in_features)
        torch.testing.assert_close(nn.functional.linear(given, linear.weight, linear.bias), made, atol=1e-5, rtol=1e-5)
        assert dict(model.named_modules())[linear.name] is linear.module


def test_linears_of_a_site_read_the_same_input(model: PreTrainedModel, tokens: Tensor) -> None:
    view = ModelView.of(model)
    seen = record_inputs_and_outputs(model, view, tokens)
    for block in view.blocks:
        assert tuple(site.rpartition(".")[2] for site in block.sites) == SITE_ORDER
        for members in block.sites.values():
            for linear in members:
                assert torch.equal(seen[linear.name][0], seen[members[0].name][0])
                assert linear.block == block.index


def test_norms_make_what_the_linears_read(model: PreTrainedModel, tokens: Tensor) -> None:
    view = ModelView.of(model)
    inputs = record_inputs_and_outputs(model, view, tokens)
    made: dict[int, Tensor] = {}
    for block in view.blocks:
        for norm in (block.attention.norm, block.mlp.norm):
            norm.register_forward_hook(lambda m, a, output: made.__setitem__(id(m), output.detach()))
    given_to_head: list[Tensor] = []
    view.lm_head.register_forward_hook(lambda m, args, output: given_to_head.append(args[0].detach()))
    view.final_norm.register_forward_hook(lambda m, a, output: made.__setitem__(id(m), output.detach()))
    with torch.no_grad():
        model(tokens)
    for block in view.blocks:
        assert torch.equal(made[id(block.attention.norm)], inputs[block.attention.linears[0].name][0])
        assert torch.equal(made[id(block.mlp.norm)], inputs[block.mlp.linears[0].name][0])
    assert torch.equal(made[id(view.final_norm)], given_to_head[0])


def test_rows_are_what_attention_uses(model: PreTrainedModel, tokens: Tensor) -> None:
    """The values that the cache receives are the rows named k and v (keys before rotation and norm)."""
    view = ModelView.of(model)
    seen = record_inputs_and_outputs(model, view, tokens)
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    for block in view.blocks:
        attention = block.attention
        width = attention.num_kv_heads * attention.head_dim
        parts: dict[str, Tensor] = {}
        for linear in attention.linears:
            output = seen[linear.name][1]
            if linear.rows:
                parts |= {role: output[..., rows] for role, rows in linear.rows.items()}
                covered = torch.cat([torch.arange(linear.out_features)[rows] for rows in linear.rows.values()])
                assert sorted(covered.tolist()) == list(range(linear.out_features))
            else:
                parts[linear.role] = output
        assert parts["q"].shape[-1] == attention.num_heads * attention.head_dim
        assert parts["k"].shape[-1] == parts["v"].shape[-1] == width
        heads = parts["v"].unflatten(-1, (attention.num_kv_heads, attention.head_dim)).transpose(1, 2)
        assert torch.equal(cache.layers[block.index].values, heads[:, :, -cache.layers[block.index].values.shape[2] :])
        keys = parts["k"].unflatten(-1, (attention.num_kv_heads, attention.head_dim)).transpose(1, 2)
        if attention.k_norm is not None:
            keys = attention.k_norm(keys).detach()
        stored = cache.layers[block.index].keys
        keys = keys[:, :, -stored.shape[2] :]
        assert torch.equal(stored[..., attention.rotary_dim :], keys[..., attention.rotary_dim :])
        if attention.rotary:
            half = attention.rotary_dim // 2
            pair_norm = stored[..., :half] ** 2 + stored[..., half : 2 * half] ** 2
            torch.testing.assert_close(pair_norm, keys[..., :half] ** 2 + keys[..., half : 2 * half] ** 2)
            assert not torch.allclose(stored[..., :half], keys[..., :half])


@given(parts=st.integers(1, 4), heads=st.integers(1, 5), head_dim=st.integers(1, 6))
def test_fused_rows_are_a_partition(parts: int, heads: int, head_dim: int) -> None:
    roles = tuple("abcd"[:parts])
    for rows in (rows_by_head(roles, heads, head_dim), rows_in_order(*((role, heads * head_dim) for role in roles))):
        every = torch.arange(parts * heads * head_dim)
        assert torch.equal(torch.cat([every[rows[role]] for role in roles]).sort().values, every)
    heads_of_first = torch.arange(parts * heads * head_dim).view(heads, parts * head_dim)[:, :head_dim]
    assert torch.equal(torch.as_tensor(rows_by_head(roles, heads, head_dim)["a"]), heads_of_first.reshape(-1))


def test_gated_and_fused_mlps(model: PreTrainedModel) -> None:
    for block in ModelView.of(model).blocks:
        roles = {linear.role for linear in block.mlp.linears} | {r for x in block.mlp.linears for r in x.rows}
        assert ("gate" in roles) == block.mlp.gated
        assert {"up", "down"} <= roles


def test_weights_are_views_and_can_be_set(model: PreTrainedModel, tokens: Tensor) -> None:
    view = ModelView.of(model)
    with torch.no_grad():
        before = model(tokens).logits
        linear = view.linears[0]
        linear.set_weight(linear.weight * 1.5)
        assert not torch.equal(model(tokens).logits, before)
        linear.weight.div_(1.5)
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-3, atol=1e-3)
    assert not linear.weight.requires_grad
    with pytest.raises(TargetError, match=r"does not fit"):
        linear.set_weight(torch.zeros(3, 5))


def test_replace_changes_the_model(model: PreTrainedModel, tokens: Tensor) -> None:
    for linear in ModelView.of(model).linears:
        dense = nn.Linear(linear.in_features, linear.out_features)
        with torch.no_grad():
            dense.weight.copy_(linear.weight)
            dense.bias.zero_() if linear.bias is None else dense.bias.copy_(linear.bias)
        linear.replace(dense)
    again = ModelView.of(model)
    assert all(type(linear.module) is nn.Linear and not linear.transposed for linear in again.linears)
    with torch.no_grad():
        expected = random_model(again.family)(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_embedding_head_and_tying(model: PreTrainedModel) -> None:
    view = ModelView.of(model)
    assert view.embedding.weight.shape[0] == 131
    assert view.tied_head == bool(model.config.tie_word_embeddings)
    assert view.tied_head == (view.family in {"qwen2", "gemma2", "gemma3", "opt", "gpt2"})
    assert (view.positions is not None) == (view.family in {"opt", "gpt2"})
    assert view.tied_head == ModelView.of(copy.deepcopy(model)).tied_head
    assert view.unit_offset_norms == view.family.startswith("gemma")


def test_neox_is_parallel_and_partly_rotated() -> None:
    block = ModelView.of(random_model("gpt_neox")).blocks[0]
    assert block.parallel
    assert (block.attention.head_dim, block.attention.rotary_dim) == (16, 4)
    assert not ModelView.of(random_model("gpt_neox", use_parallel_residual=False)).blocks[0].parallel


def names(linears: tuple[LinearView, ...]) -> list[str]:
    return [linear.name for linear in linears]


def test_select_by_name_last_part_and_role() -> None:
    view = ModelView.of(random_model("llama"))
    assert names(view.select(("*",))) == names(view.linears)
    assert len(view.linears) == 14
    assert names(view.select(("q_proj",))) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert names(view.select(("model.layers.1.*",))) == names(view.blocks[1].linears)
    assert names(view.select(("down", "q"))) == [
        f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")
    ]


def test_select_refuses_what_matches_nothing() -> None:
    view = ModelView.of(random_model("llama"))
    with pytest.raises(TargetError, match=r"'q_porj' \(14 searched\). Did you mean 'q_proj' \(2 matches\)"):
        view.select(("down_proj", "q_porj"))


def test_unknown_architecture_is_named() -> None:
    config = AutoConfig.for_model(
        "bloom", vocab_size=17, hidden_size=8, n_layer=1, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    with pytest.raises(TargetError, match=r"BloomForCausalLM \(model_type 'bloom'\). Known: gemma2"):
        ModelView.of(AutoModelForCausalLM.from_config(config))


def test_post_norm_opt_is_refused_with_the_reason() -> None:
    with pytest.raises(TargetError, match=r"do_layer_norm_before=False"):
        ModelView.of(random_model("opt", do_layer_norm_before=False))


def test_unknown_family_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'llama'"):
        random_model("lama")
