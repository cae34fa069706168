"""Injection changes no logit and makes channels uneven; what it cannot do without changing logits it refuses."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from trimtab.core.errors import ConfigError, TargetError
from trimtab.evaluation.outliers import inject_outliers
from trimtab.models import ModelView

from .conftest import small_model

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
SMALL_GPT = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}


def llama() -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True))


def mistral() -> tf.PreTrainedModel:
    return tf.MistralForCausalLM(tf.MistralConfig(**SMALL))


def qwen2() -> tf.PreTrainedModel:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL))


def qwen3() -> tf.PreTrainedModel:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL))


def gemma2() -> tf.PreTrainedModel:
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL))


def gemma3() -> tf.PreTrainedModel:
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SMALL))


def phi3() -> tf.PreTrainedModel:
    return tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL))


def gpt2() -> tf.PreTrainedModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL_GPT))


def gpt_neox() -> tf.PreTrainedModel:
    options = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**options, rotary_pct=0.5))


def opt() -> tf.PreTrainedModel:
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=97,
            hidden_size=48,
            ffn_dim=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=48,
            init_std=0.2,
        )
    )


FAMILIES = [llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, gpt2, gpt_neox, opt]


def logits_of(model: tf.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None] % 90).logits


def vary(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """Norm gains and biases that are not all one and zero, so that leaving one out would show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("kind", ["activations", "weights"])
@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_logits_stay_and_weights_change(make, kind: str) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = vary(make())
    before = logits_of(model)
    weights = {linear.name: linear.weight.clone() for linear in ModelView.of(model).linears}
    report = inject_outliers(model, seed=3, scale=16, channels=4, kind=kind)
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=1e-5 * max(1.0, float(before.abs().max())))
    changed = {linear.name for linear in ModelView.of(model).linears if not linear.weight.equal(weights[linear.name])}
    gated = make not in (gpt2, gpt_neox, opt)
    assert bool(report.unchanged) == (not gated)
    spared = {"q_proj", "k_proj"} if make in (qwen3, gemma3) else set()  # their gains take the factor
    assert {name for name in weights if name not in changed and name.rpartition(".")[2] not in spared} <= (
        set() if gated else {name for name in weights if name.endswith(("fc2", "mlp.c_proj", "dense_4h_to_h"))}
    )


def test_bfloat16_stays_exact() -> None:
    model = small_model().to(torch.bfloat16)
    before = logits_of(model)
    inject_outliers(model)
    assert logits_of(model).equal(before)


def unevenness(model: tf.PreTrainedModel) -> dict[str, float]:
    """Largest over median size of an input channel of the first q_proj, and of a column of its weight."""
    layer = model.model.layers[0].self_attn.q_proj
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    logits_of(model)
    handle.remove()
    sizes = {"activations": inputs[0].abs().amax(dim=(0, 1)), "weights": layer.weight.detach().abs().amax(dim=0)}
    return {name: float(size.max() / size.median()) for name, size in sizes.items()}


@pytest.mark.parametrize("kind", ["activations", "weights"])
def test_kinds_make_the_outliers_they_say(kind: str) -> None:
    model = small_model()
    before = unevenness(model)
    inject_outliers(model, channels=2, kind=kind)
    assert unevenness(model)[kind] > 4 * before[kind]


def test_same_seed_same_channels() -> None:
    reports = [inject_outliers(small_model(), seed=seed) for seed in (1, 1, 2)]
    assert reports[0] == reports[1]
    assert reports[0].channels != reports[2].channels


def test_a_model_that_does_not_compute_what_its_view_says_is_restored() -> None:
    model = small_model()
    model.model.layers[1].self_attn.o_proj.register_forward_hook(
        lambda module, args, output: output.tanh() * args[0].mean()
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TargetError, match="The model is as before"):
        inject_outliers(model)
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())


def test_refusals() -> None:
    for options in ({"scale": 10}, {"scale": 1}, {"channels": 0}, {"kind": "keys"}):
        with pytest.raises(ConfigError):
            inject_outliers(small_model(), **options)  # type: ignore[arg-type]
