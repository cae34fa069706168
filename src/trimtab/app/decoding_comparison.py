"""Measure several decoding methods on one model: the work behind `trimtab compare --decodings`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trimtab.app.cli.options import decoding_methods
from trimtab.app.comparison import check_prefixes
from trimtab.core.run_record import RunRecord

if TYPE_CHECKING:
    from trimtab.decoding.base import DecodingMethod
    from trimtab.evaluation.decodings import DecodingReference

KIND = "decodings"
PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class DecodingVariant:
    """One row: methods that decode together. None: plain decoding."""

    label: str
    methods: tuple[DecodingMethod, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodingSetting:
    """What is the same for all rows.

    model         any name that `trimtab.load` takes
    limit         prompts; None: as many as usual
    temperature   0: greedily, so that texts can be compared
    """

    model: str
    limit: int | None = None
    temperature: float = 0.0
    seed: int = 0
    device: str | None = None


def plan_decodings(names: Sequence[str], settings: Mapping[str, str]) -> list[DecodingVariant]:
    """Plain decoding, then each of the names; `dola+rsd_s` names methods that decode together.

    A setting `option` goes to all methods, `method.option` to one. Raises ConfigError for what a method does not have
    or accept, before anything runs.
    """
    split = [name.split("+") for name in names]
    check_prefixes([part for parts in split for part in parts], settings)
    variants = [DecodingVariant(PLAIN)]
    for parts in split:
        own = [f"{key}={value}" for key, value in settings.items() if key.partition(".")[0] in parts or "." not in key]
        variants.append(DecodingVariant("+".join(parts), tuple(decoding_methods(parts, own))))
    return variants


def run_decodings(setting: DecodingSetting, variants: Sequence[DecodingVariant]) -> Iterator[RunRecord]:
    """Measure each variant; yields its record when it is done. The first must be plain decoding."""
    import trimtab as tt
    from trimtab.evaluation import decodings

    model = tt.load(setting.model, device=setting.device)
    reference: DecodingReference | None = None
    for variant in variants:
        record = RunRecord(command="compare", config=_config(setting, variant), seed=setting.seed)
        with record.timed("decode"):
            if reference is None:
                reference, figures = decodings.decoding_reference(
                    model,
                    prompts=setting.limit or decodings.PROMPTS,
                    temperature=setting.temperature,
                    seed=setting.seed,
                )
            else:
                figures = decodings.measure_decoding(model, variant.methods, reference)
        record.metrics |= figures
        yield record


def _config(setting: DecodingSetting, variant: DecodingVariant) -> dict[str, Any]:
    options = {type(method).name(): method.to_dict() for method in variant.methods}
    own = {"kind": KIND, "label": variant.label, "method": "+".join(options) or None, "options": options}
    return own | asdict(setting)
