"""What the methods share that give groups of columns a scale each: bits, group size, their fit to every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trimtab.core.errors import ConfigError, TargetError
from trimtab.tensors.grid import GridFormat
from trimtab.weights.base import WeightMethod

if TYPE_CHECKING:
    from trimtab.models.views import LinearView

GROUP_SIZES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class GroupMethod(WeightMethod):
    """A method with a code for every weight and a scale for every group of columns of a row.

    bits          bits per code: 2, 3, 4 or 8
    group_size    columns of a row that share a scale; must divide the width of every target; -1 = one group per row
    """

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = 64

    def check(self) -> None:
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigError(
                f"{type(self).__name__}: option group_size={self.group_size} must be positive, or -1 for one per row."
            )

    def check_linear(self, linear: LinearView) -> None:
        try:
            GridFormat(group_size=self.group_size).group_length((linear.out_features, linear.in_features))
        except ConfigError as error:
            raise TargetError(f"{linear.name} (role {linear.role}): {error}") from None

    def check_targets(self, linears: Sequence[LinearView]) -> None:
        try:
            super().check_targets(linears)
        except TargetError as error:
            widths = sorted({linear.in_features for linear in linears})
            common = [str(g) for g in GROUP_SIZES if all(width % g == 0 for width in widths)]
            fit = f"all {len(linears)} targets (widths {', '.join(map(str, widths))}): {', '.join([*common, '-1'])}."
            raise TargetError(f"{error} Group sizes that fit {fit}") from None
