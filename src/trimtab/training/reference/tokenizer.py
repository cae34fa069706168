"""The tokenizer of the reference models: byte-level BPE with 4,096 tokens.

Digits are always tokens of their own. The words of the small world are shown to the trainer often
enough that each becomes one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trimtab.world import documents
from trimtab.world.lexicon import KEYS
from trimtab.world.lexicon import VALUES as RECORD_VALUES
from trimtab.world.people import FIRST_NAMES, LAST_NAMES
from trimtab.world.people import VALUES as FACT_VALUES

VOCAB_SIZE = 4096
CONTEXT = 2048
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
WORLD_DOCUMENTS = 20_000
WORD_REPEATS = 1500

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Answer: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Question: ' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
"""Chat as the small world writes it: questions and answers, one per line."""


def world_words() -> tuple[str, ...]:
    """All words that must be single tokens after a space."""
    values = [value for each in FACT_VALUES.values() for value in each]
    return tuple(dict.fromkeys([*KEYS, *RECORD_VALUES, *FIRST_NAMES, *LAST_NAMES, *values]))


def _texts(books: list[Path]) -> Iterator[str]:
    for book in books:
        yield book.read_text(encoding="utf-8")
    yield from islice(documents("train", seed=0), WORLD_DOCUMENTS)
    for word in world_words():
        yield f" {word}" * WORD_REPEATS


def train_tokenizer(books: list[Path]) -> PreTrainedTokenizerFast:
    """Learn the tokenizer from training books and world text; a text gets ``<|bos|>`` in front."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True) for t in (PAD, BOS, EOS)],
        show_progress=False,
    )
    core.train_from_iterator(_texts(books), trainer)
    bos = core.token_to_id(BOS)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
