"""What the claims of both recursive methods share: exactness, and more tokens than chains and independent sequences."""

from __future__ import annotations

from trimtab.claims._drafts import MEASURED, ON_TABLES, accepted, figures, on_tables
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.decoding import Spectr, Speculative
from trimtab.decoding.base import DecodingMethod
from trimtab.evaluation.acceptance import DRAFT
from trimtab.evaluation.exactness.gate import LOWEST_P

WIDTH, DEPTH = 4, 4


def exact(small: DecodingMethod) -> Outcome:
    tree, lossy = on_tables(small), on_tables(Speculative(draft=DRAFT, depth=2, rule="typical"))
    return Outcome(
        measured={"p_value": tree.p_value, "total_variation": tree.total_variation},
        baseline={
            "p_value_typical_acceptance": lossy.p_value,
            "total_variation_typical_acceptance": lossy.total_variation,
        },
        holds=tree.p_value > LOWEST_P >= lossy.p_value,
    )


def more_than(tree: DecodingMethod, other: DecodingMethod) -> Outcome:
    name, found, beside = type(tree).name(), accepted(tree), accepted(other)
    gain = found.gain(beside)
    return Outcome(
        measured=figures(name, found) | {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high},
        baseline=figures(type(other).name(), beside),
        holds=gain.low > 0,
    )


def claims_of_tree(small: DecodingMethod, tree: DecodingMethod, shape: str) -> tuple[Claim, ...]:
    """small: for tables; tree: for `ref`, of `WIDTH` sequences and `DEPTH` levels, in words its shape."""
    name = type(tree).name()
    chain, several = Speculative(draft=DRAFT, depth=DEPTH), Spectr(draft=DRAFT, k=WIDTH, depth=DEPTH)
    rule = "Holds if the paired 95 % interval of the gain in tokens per forward pass lies above zero"
    paper = method_info(name).paper
    return (
        Claim(
            name,
            paper,
            f"Recursive rejection sampling of {shape} leaves the distribution of the large model as it is.",
            f"{ON_TABLES}, and the test refuses the baseline, typical acceptance.",
            lambda: exact(small),
        ),
        Claim(
            name,
            paper,
            f"At equal depth, {shape} writes more tokens per forward pass than speculative decoding.",
            f"{MEASURED}, {shape} of {WIDTH} sequences and depth {DEPTH} against a chain of that depth, the baseline. "
            f"{rule}.",
            lambda: more_than(tree, chain),
        ),
        Claim(
            name,
            paper,
            f"At equal depth, {shape} writes more tokens per forward pass than SpecTr.",
            f"{MEASURED}, {shape} of {WIDTH} sequences and depth {DEPTH} against as many independent ones, the "
            f"baseline. {rule}.",
            lambda: more_than(tree, several),
        ),
    )
