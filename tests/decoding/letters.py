"""A model of a dozen letters with a tokenizer: small enough to draw from ten thousands of times."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trimtab.models import info_of, random_model

LETTERS = "0123456789=\n"


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Every letter is a token, and nothing else is."""
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="="))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
    )


def letters_model(seed: int = 0) -> PreTrainedModel:
    """A random Llama of these letters."""
    model = random_model("llama", seed, vocab_size=len(LETTERS))
    info_of(model).tokenizer = letters_tokenizer()
    return model
