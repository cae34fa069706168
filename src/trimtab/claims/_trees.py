"""What the claims of both recursive methods share: exactness, and more tokens than chains and independent sequences."""

from __future__ import annotations

from trimtab.claims._drafts import MEASURED, ON_TABLES, accepted, exact_on_tables, figures
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.decoding import Spectr, Speculative
from trimtab.decoding.base import DecodingMethod
from trimtab.evaluation.acceptance import DRAFT

WIDTH, DEPTH = 4, 4


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
            lambda: exact_on_tables(small),
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
