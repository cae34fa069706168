"""A model with methods of decoding: what the front doors of the room call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedModel

from trimtab.core.errors import CompositionError, DataError
from trimtab.decoding._controller import Controller
from trimtab.decoding._distribution import Distribution, LogitsTransform, Warp
from trimtab.decoding._joint import JointReader
from trimtab.decoding._loop import Generation, Loop, NoDraft, OnTokens
from trimtab.decoding._named import check_tokens, named_model
from trimtab.decoding._reader import ModelReader, Reader
from trimtab.decoding._rules.token import GreedyRule, SampleRule
from trimtab.decoding._sampling import Sampling
from trimtab.decoding.base import DecodingMethod, Drafting, DraftSetting
from trimtab.models import tokenizer_of
from trimtab.models.early_exits import Exit
from trimtab.models.segments import CachePlan, HeadPlan, SegmentCache, TensorPlan
from trimtab.models.views import ModelView
from trimtab.tensors.kv.codec import KVCodec

NewCache = Callable[[PreTrainedModel], SegmentCache]
_BLOCK_TOKENS = 256


class Decoder:
    """Decodes with a model by methods that supply different parts; without any it is plain decoding.

    new_cache   for each generation, an empty transactional cache of the target, such as `tt.cache.Kivi(bits=4).new`;
                None: exact keys and values. Drafts keep theirs exact
    drafts      name -> model, for what methods name in their options, as `draft`, `tuned`; others are loaded
    adapt       leave out drafts while they cost more than they save, as found in this and earlier generations of so
                many texts (Controller); False: draft always. Above temperature 0 a seed repeats a text only with
                False: what is drawn depends on which rounds had a draft, its distribution does not
    before      transforms between the methods' and those of `Sampling`

    Raises CompositionError for two methods that draft, or two that search.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        methods: Sequence[DecodingMethod] = (),
        *,
        new_cache: NewCache | None = None,
        drafts: Mapping[str, PreTrainedModel] | None = None,
        adapt: bool = True,
        before: Sequence[LogitsTransform] = (),
    ) -> None:
        self.model = model
        self.methods = tuple(methods)
        self.new_cache = new_cache or exact_cache
        self.adapt = adapt
        self._before = tuple(before)
        self._named = dict(drafts or {})
        self._alike: set[str] = set()
        self._controllers: dict[int, Controller] = {}
        self._companions = {name: other for m in self.methods for name, other in m.companions(self.named).items()}
        for part, own in (("drafting", DecodingMethod.drafting), ("search", DecodingMethod.search)):
            able = [m.name() for m in self.methods if getattr(type(m), part) is not own]
            if len(able) > 1:
                raise CompositionError(f"{' and '.join(able)} each bring their own {part}; one generation has one.")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        on_tokens: OnTokens | None = None,
    ) -> Generation:
        """Continue every prompt of token ids; rows of the batch do not influence each other.

        Raises DataError for an empty prompt or one that does not leave room for `max_new_tokens`, and CompositionError
        for a draft whose tokenizer is not the model's.
        """
        self.check_length(prompts, sampling)
        for method in self.methods:
            if (found := method.search(self, prompts, sampling)) is not None:
                if on_tokens is not None:
                    for row, tokens in enumerate(found.tokens):
                        on_tokens(row, tokens)
                return found
        return self.loop(len(prompts), sampling).run(prompts, sampling, decode=self.decode, on_tokens=on_tokens)

    def loop(self, rows: int, sampling: Sampling) -> Loop:
        """The decoding loop for so many texts, its caches empty."""
        distribution = self.distribution(sampling)
        drafting = self._drafting(sampling)
        controller = self._controllers.setdefault(rows, Controller()) if self.adapt else Controller(fixed=True)
        return Loop(self.reader(rows, distribution.exits), distribution, drafting.proposer, drafting.rule, controller)

    def distribution(self, sampling: Sampling) -> Distribution:
        """What is decoded: the methods' transforms in their order, then `sampling`."""
        transforms = [t for method in self.methods for t in method.transforms(self.model)]
        return Distribution([*transforms, *self._before, Warp(sampling)])

    def reader(self, rows: int, exits: Sequence[Exit] = ()) -> Reader:
        """The target for so many texts, together with the methods' companions."""
        own = ModelReader(self.model, rows, self.new_cache, exits)
        if not self._companions:
            return own
        return JointReader(own, {n: ModelReader(other, rows, exact_cache) for n, other in self._companions.items()})

    def _drafting(self, sampling: Sampling) -> Drafting:
        setting = DraftSetting(
            sampling,
            lambda name: lambda rows: ModelReader(self.named(name), rows, exact_cache),
            lambda temperature: Distribution([Warp(sampling.at(temperature))]),
            self.new_cache(self.model).positions,
        )
        for method in self.methods:
            if (found := method.drafting(setting)) is not None:
                return found
        return Drafting(NoDraft(), GreedyRule() if sampling.temperature == 0 else SampleRule())

    def named(self, name: str, *, same_tokens: bool = True) -> PreTrainedModel:
        """The model that a method's option names, loaded once.

        Raises CompositionError if its tokens are not the model's, unless they need not be, and what loading raises.
        """
        if name not in self._named:
            self._named[name] = named_model(name, self.model)
        if same_tokens and name not in self._alike:
            check_tokens(self._named[name], self.model, name)
            self._alike.add(name)
        return self._named[name]

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones left out."""
        return str(tokenizer_of(self.model).decode(list(tokens), skip_special_tokens=True))

    @property
    def lossless(self) -> bool:
        """Whether texts follow the distribution that the model and the methods' transforms define."""
        return all(method.lossless for method in self.methods)

    def check_length(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Raise DataError for a prompt without tokens or one that leaves no room."""
        limit = self.reader(len(prompts)).positions
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise DataError(f"prompt {row} holds no token; every text needs at least one to go on from.")
            if limit is not None and len(prompt) + sampling.max_new_tokens > limit:
                raise DataError(
                    f"prompt {row} ({len(prompt)} tokens) and max_new_tokens {sampling.max_new_tokens} exceed the "
                    f"model's {limit} positions, or those of a model that it is decoded with."
                )


def exact_cache(model: PreTrainedModel) -> SegmentCache:
    """A transactional cache that keeps every key and value as it is."""
    plan = TensorPlan(codec=KVCodec(bits=0), block=_BLOCK_TOKENS)
    heads = [tuple(range(block.attention.num_kv_heads)) for block in ModelView.of(model).blocks]
    layers = tuple((HeadPlan(heads=own, keys=plan, values=plan),) for own in heads)
    return SegmentCache(model, CachePlan(layers, name="exact"))
