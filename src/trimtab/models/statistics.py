"""Statistics of a linear's input that methods can ask for. One accumulator per statistic, merged over chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Need = Literal["abs_max", "mean_abs", "second_moment", "gram", "reservoir"]


@dataclass(frozen=True, slots=True)
class Stats:
    """Statistics of one site, float32, over the tokens that are not padding. Those not asked for are None.

    count           tokens seen
    abs_max         [in]      max |x_j|
    mean_abs        [in]      E|x_j|
    second_moment   [in]      E[x_j^2]
    gram            [in, in]  E[x x^T]
    reservoir       [k, in]   a uniform sample of input rows
    """

    site: str
    count: int
    abs_max: Tensor | None = None
    mean_abs: Tensor | None = None
    second_moment: Tensor | None = None
    gram: Tensor | None = None
    reservoir: Tensor | None = None
