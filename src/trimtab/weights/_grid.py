"""What the methods that store an integer grid share: its options, its fit to a layer, its scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trimtab.tensors.grid import GridFormat, grid_parameters
from trimtab.tensors.grid_search import IMATRIX_SEARCH, MSE_SEARCH, ClipSearch, group_parameters
from trimtab.weights._groups import GroupMethod

Clip = Literal["none", "mse", "imatrix"]
_SEARCH: dict[Clip, ClipSearch | None] = {"none": None, "mse": MSE_SEARCH, "imatrix": IMATRIX_SEARCH}


@dataclass(frozen=True, kw_only=True)
class GridMethod(GroupMethod):
    """A method whose result is one `GroupGrid`: `w ~ scale * (code - zero)` per group of columns.

    Options of GroupMethod, and:

    symmetric     no zero points. The default is asymmetric, as in the papers of both methods that share this class:
                  its zero point costs one byte per group (0.125 bits per weight at 64) and lowers the error by a fifth.
                  All grid methods have the same default, so that comparisons are at equal bytes
    clip          "none": the full range of the group. "mse": the shrunken range of least |error|^2.4. "imatrix": the
                  same weighted by E[x_j^2], which needs calibration data
    scale_dtype   stored dtype of the scales; rounded to it before any code is computed
    zero_dtype    stored dtype of the zero points. "float16": fractional, so that a group's range is met exactly and
                  pv_tuning can tune them; 8 bits more per group
    """

    symmetric: bool = False
    clip: Clip = "none"
    scale_dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    zero_dtype: Literal["uint8", "float16"] = "uint8"

    @property
    def format(self) -> GridFormat:
        return GridFormat(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=self.scale_dtype,
            zero_dtype=self.zero_dtype,
        )

    @property
    def search(self) -> ClipSearch | None:
        return _SEARCH[self.clip]

    def parameters(self, weight: Tensor, second_moment: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros of all groups of `weight` [out, in]; `second_moment` [in] is used by clip="imatrix" only."""
        return grid_parameters(weight, self.format, self.search, self._importance(second_moment))

    def group_parameters(self, columns: Tensor, second_moment: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales [out] and zeros [out] of one group, given its columns [out, length]; as `parameters` has them."""
        importance = self._importance(second_moment)
        spread = None if importance is None else importance.expand(columns.shape)
        return group_parameters(columns, self.format, self.search, spread)

    def _importance(self, second_moment: Tensor | None) -> Tensor | None:
        return second_moment if self.clip == "imatrix" else None
