"""Statistics of a linear's input that methods can ask for. One accumulator per statistic, merged over chunks.

A method names what it needs (`Need`); `SiteAccumulator` computes the union for one site while activations stream by,
`Stats` is the result. Means are running means with their token count, so accumulators of several workers merge by a
weighted sum, and statistics_file.py keeps results for other methods and bit widths.

A statistic of one's own: subclass `Accumulator`, enter it in ACCUMULATORS, give `Stats` and `Need` its name.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.core.errors import NumericsError

Need = Literal["abs_max", "mean", "mean_abs", "second_moment", "gram", "reservoir"]
RESERVOIR_ROWS = 512


@dataclass(frozen=True, slots=True)
class Stats:
    """Statistics of one site, float32, over the tokens that are not padding. Those not asked for are None.

    count           tokens seen
    abs_max         [in]      max |x_j|
    mean            [in]      E[x_j]
    mean_abs        [in]      E|x_j|
    second_moment   [in]      E[x_j^2]
    gram            [in, in]  E[x x^T]
    reservoir       [k, in]   a uniform sample of input rows
    """

    site: str
    count: int
    abs_max: Tensor | None = None
    mean: Tensor | None = None
    mean_abs: Tensor | None = None
    second_moment: Tensor | None = None
    gram: Tensor | None = None
    reservoir: Tensor | None = None


class Accumulator(ABC):
    """One statistic of a stream of rows [tokens, in], float32 and finite."""

    def __init__(self, width: int, seed: int) -> None:
        self.width = width
        self.seed = seed
        self.count = 0

    @abstractmethod
    def update(self, rows: Tensor) -> None:
        """Take in rows [tokens, in]; called with at least one row."""

    @abstractmethod
    def merge(self, other: Accumulator) -> None:
        """Take in what another accumulator of the same kind saw elsewhere."""

    @abstractmethod
    def result(self) -> Tensor:
        """The statistic in float32. Only valid once a row was seen."""


class AbsMax(Accumulator):
    """max |x_j|."""

    maximum: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        self._take(rows.abs().amax(dim=0), len(rows))

    def merge(self, other: Accumulator) -> None:
        assert isinstance(other, AbsMax)
        if other.maximum is not None:
            self._take(other.maximum, other.count)

    def _take(self, maximum: Tensor, count: int) -> None:
        self.maximum = maximum if self.maximum is None else torch.maximum(self.maximum, maximum.to(self.maximum.device))
        self.count += count

    def result(self) -> Tensor:
        assert self.maximum is not None
        return self.maximum


class RunningMean(Accumulator):
    """A mean over tokens, kept as a mean (not a sum) so that its size does not depend on the number of tokens."""

    mean: Tensor | None = None

    @abstractmethod
    def chunk_mean(self, rows: Tensor) -> Tensor:
        """Mean over the rows of one chunk."""

    def update(self, rows: Tensor) -> None:
        self._take(self.chunk_mean(rows), len(rows))

    def merge(self, other: Accumulator) -> None:
        assert isinstance(other, RunningMean)
        if other.mean is not None:
            self._take(other.mean.clone(), other.count)

    def _take(self, mean: Tensor, count: int) -> None:
        self.count += count
        if self.mean is None:
            self.mean = mean
        else:
            self.mean.lerp_(mean.to(self.mean.device), count / self.count)

    def result(self) -> Tensor:
        assert self.mean is not None
        return self.mean.float()


class Mean(RunningMean):
    """E[x_j], in float64."""

    def chunk_mean(self, rows: Tensor) -> Tensor:
        return rows.mean(dim=0, dtype=torch.float64)


class MeanAbs(RunningMean):
    """E|x_j|, in float64."""

    def chunk_mean(self, rows: Tensor) -> Tensor:
        return rows.abs().mean(dim=0, dtype=torch.float64)


class SecondMoment(RunningMean):
    """E[x_j^2], in float64."""

    def chunk_mean(self, rows: Tensor) -> Tensor:
        return rows.square().mean(dim=0, dtype=torch.float64)


class Gram(RunningMean):
    """E[x x^T], in float32: the only statistic whose size is quadratic in the width, so updated in place."""

    def chunk_mean(self, rows: Tensor) -> Tensor:
        return (rows.T @ rows).div_(len(rows))

    def update(self, rows: Tensor) -> None:
        if self.mean is None:
            super().update(rows)
            return
        self.count += len(rows)
        keep = 1.0 - len(rows) / self.count
        torch.addmm(self.mean, rows.T, rows, beta=keep, alpha=1.0 / self.count, out=self.mean)


class Reservoir(Accumulator):
    """A uniform sample of rows without replacement.

    Every row draws a random key and the smallest keys stay. Samples of several workers with different seeds merge by
    the same rule, and the sample does not depend on how the stream was cut into chunks.
    """

    def __init__(self, width: int, seed: int, size: int = RESERVOIR_ROWS) -> None:
        super().__init__(width, seed)
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)
        self.keys = torch.empty(0, dtype=torch.int64)
        self.rows: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        keys = torch.empty(len(rows), dtype=torch.int64).random_(generator=self.generator)
        self._take(keys, rows, len(rows))

    def merge(self, other: Accumulator) -> None:
        assert isinstance(other, Reservoir)
        if other.rows is not None:
            self._take(other.keys, other.rows, other.count)

    def _take(self, keys: Tensor, rows: Tensor, count: int) -> None:
        self.count += count
        all_keys = torch.cat([self.keys, keys])
        kept = all_keys.argsort(stable=True)[: self.size]
        self.keys = all_keys[kept]
        held = rows.new_empty(0, self.width) if self.rows is None else self.rows
        old = kept < len(held)
        chosen = rows.new_empty(len(kept), self.width)
        chosen[old.to(rows.device)] = held[kept[old].to(held.device)].to(rows.device)
        chosen[~old.to(rows.device)] = rows[(kept[~old] - len(held)).to(rows.device)]
        self.rows = chosen

    def result(self) -> Tensor:
        assert self.rows is not None
        return self.rows


ACCUMULATORS: dict[Need, type[Accumulator]] = {
    "abs_max": AbsMax,
    "mean": Mean,
    "mean_abs": MeanAbs,
    "second_moment": SecondMoment,
    "gram": Gram,
    "reservoir": Reservoir,
}


class SiteAccumulator:
    """The statistics that methods need of one site, gathered from the activations that stream through it."""

    def __init__(self, site: str, width: int, needs: Iterable[Need], *, seed: int = 0) -> None:
        self.site = site
        self.width = width
        site_seed = zlib.crc32(site.encode()) ^ (seed & 0xFFFFFFFF)  # sites draw independent samples
        self.accumulators = {need: ACCUMULATORS[need](width, site_seed) for need in sorted(needs)}
        self.count = 0

    def update(self, activations: Tensor, mask: Tensor | None = None, *, module: str = "") -> None:
        """Take in activations [..., in] of any float dtype; `mask` (bool, the leading shape) is False at padding.

        Raises NumericsError naming `module` and the site if a value that is not padding is NaN or infinite.
        """
        rows = activations.detach().reshape(-1, self.width).float()
        if mask is not None and not bool(mask.all()):
            rows = rows[mask.reshape(-1).to(rows.device)]
        if len(rows) == 0:
            return
        if not bool(torch.isfinite(rows).all()):
            raise NumericsError(self._not_finite(rows, module))
        self.count += len(rows)
        for accumulator in self.accumulators.values():
            accumulator.update(rows)

    def _not_finite(self, rows: Tensor, module: str) -> str:
        nan, inf = int(rows.isnan().sum()), int(rows.isinf().sum())
        token, channel = (int(i) for i in (~rows.isfinite()).nonzero()[0])
        return (
            f"the input of {module or 'a linear layer'} (site {self.site}) holds {nan} NaN and {inf} infinite values "
            f"in {len(rows)} calibration tokens, the first at token {token}, channel {channel}. Check the model's "
            "weights, or load it in a wider dtype (float32) if it overflows."
        )

    def merge(self, other: SiteAccumulator) -> None:
        """Take in what another worker saw of the same site (give workers different seeds for a fair reservoir)."""
        if (other.site, other.width) != (
            self.site,
            self.width,
        ) or other.accumulators.keys() != self.accumulators.keys():
            raise ValueError(f"statistics of {other.site} cannot be merged into those of {self.site}")
        self.count += other.count
        for need, accumulator in self.accumulators.items():
            accumulator.merge(other.accumulators[need])

    def stats(self) -> Stats:
        """What was gathered. Raises NumericsError if a mean overflowed float32."""
        results: dict[str, Tensor] = {}
        if self.count:
            results = {need: accumulator.result() for need, accumulator in self.accumulators.items()}
        for need, value in results.items():
            if not bool(torch.isfinite(value).all()):
                raise NumericsError(
                    f"statistic '{need}' of site {self.site} is not finite although its inputs are: "
                    "they are too large for float32 squares."
                )
        return Stats(self.site, self.count, **results)
