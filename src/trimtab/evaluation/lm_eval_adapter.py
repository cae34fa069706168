"""trimtab models under lm-evaluation-harness: the harness's tasks, answered by trimtab's client.

    import lm_eval
    from trimtab.evaluation.lm_eval_adapter import TrimtabLM

    lm_eval.simple_evaluate(model=TrimtabLM(pretrained="out"), tasks=["arc_easy"], limit=100)

Importing this module registers the model name "trimtab", so that `simple_evaluate(model="trimtab",
model_args="pretrained=out", ...)` works after the import. The harness is an optional package, installed apart because
it holds other versions back. Raises MissingExtra where it is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.core.errors import ConfigError, MissingExtra, did_you_mean
from trimtab.evaluation.base import Generate, LogLikelihood, Request, Score
from trimtab.evaluation.client import LocalClient
from trimtab.models import load, tokenizer_of

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    raise MissingExtra("lm-eval", "peers", "evaluating under lm-evaluation-harness") from None

__all__ = ["TrimtabLM"]

_GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "num_beams"}


@register_model("trimtab")
class TrimtabLM(LM):  # type: ignore[misc]
    """The harness's three kinds of request, on any model that trimtab loads.

    pretrained     a model, or what `trimtab.load` takes: a directory, a trimtab checkpoint, a Hugging Face id, "ref"
    tokenizer      default: that of the model
    device, dtype  where and how to load it
    max_length     most tokens read at once; default: the model's context
    batch_tokens   tokens per forward pass. The harness's own batch_size is accepted and has no effect, because
                   batches are formed by tokens and change no result

    As the harness wants, prompts that are too long lose tokens on the left (`client.truncated` counts them), and long
    texts are scored in adjoining windows of `max_length`. Only greedy generation is offered: ConfigError otherwise.
    """

    def __init__(
        self,
        pretrained: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        batch_tokens: int = 2048,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, str):
            options = {"device": device, "dtype": dtype}
            pretrained = load(pretrained, **{name: value for name, value in options.items() if value is not None})
        self.model = pretrained
        self.tokenizer = tokenizer or tokenizer_of(pretrained)
        longest = 1 << 30  # the client's window is at most the context
        self.client = LocalClient(
            self.model,
            self.tokenizer,
            batch_tokens=batch_tokens,
            context=max_length,
            window=max_length or longest,
            stride=None,
            overflow="truncate",
        )
        self.client.stride = self.client.window

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding writes it) of each (context, continuation)."""
        asked: list[Request] = [LogLikelihood(*request.args) for request in requests]
        answers = [(r.log_prob, r.is_greedy) for r in self.client.run(asked, "loglikelihood")]
        return self._cached("loglikelihood", requests, answers)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, each token scored once."""
        asked: list[Request] = [Score(request.args[0]) for request in requests]
        answers = [response.log_prob for response in self.client.run(asked, "loglikelihood_rolling")]
        return self._cached("loglikelihood_rolling", requests, answers)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text after each context, up to a stop string."""
        asked: list[Request] = [_generate(*request.args) for request in requests]
        answers = [response.text for response in self.client.run(asked, "generate_until")]
        return self._cached("generate_until", requests, answers)

    def _cached(self, kind: str, requests: Sequence[Any], answers: list[Any]) -> list[Any]:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template that `apply_chat_template` will use; "" if none is asked for."""
        if chat_template is False:
            return ""
        name = chat_template if isinstance(chat_template, str) else None
        return str(self.tokenizer.get_chat_template(name))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        assert isinstance(text, str)
        # The client puts BOS in front of every prompt of a tokenizer that wants one; a template's own is one too many.
        return text.removeprefix(str(self.tokenizer.bos_token)) if self.tokenizer.bos_token else text


def _generate(prompt: str, options: Mapping[str, Any]) -> Generate:
    unknown = set(options) - _GREEDY
    if unknown:
        raise ConfigError(f"generation option '{min(unknown)}' is not offered. {did_you_mean(min(unknown), _GREEDY)}")
    if (options.get("do_sample") and options.get("temperature", 1.0) > 0) or options.get("num_beams", 1) != 1:
        raise ConfigError(f"trimtab answers the harness greedily; the task asks for {dict(options)}.")
    until = options.get("until") or ()
    return Generate(prompt, int(options.get("max_gen_toks", 256)), (until,) if isinstance(until, str) else tuple(until))
