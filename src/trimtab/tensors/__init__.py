"""Floor 0: compressed tensor values that know how to multiply, how large they are and how to be stored.

Read base.py first, then grid.py for the most used part and compressed.py for their sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports

if TYPE_CHECKING:
    from trimtab.tensors.activations import ActivationGrid as ActivationGrid
    from trimtab.tensors.base import Part as Part
    from trimtab.tensors.binary import BinaryBases as BinaryBases
    from trimtab.tensors.bitmap import Bitmap as Bitmap
    from trimtab.tensors.codebook import Codebook as Codebook
    from trimtab.tensors.compressed import CompressedTensor as CompressedTensor
    from trimtab.tensors.grid import ClipSearch as ClipSearch
    from trimtab.tensors.grid import GridFormat as GridFormat
    from trimtab.tensors.grid import GroupGrid as GroupGrid
    from trimtab.tensors.low_rank import LowRank as LowRank
    from trimtab.tensors.low_rank import svd as svd
    from trimtab.tensors.metric import Metric as Metric
    from trimtab.tensors.nested_scales import NestedFormat as NestedFormat
    from trimtab.tensors.rotation import Rotation as Rotation
    from trimtab.tensors.sparse import SparseOutliers as SparseOutliers
    from trimtab.tensors.sparse_grid import SparseGrid as SparseGrid
    from trimtab.tensors.sparse_inputs import SparseInputs as SparseInputs
    from trimtab.tensors.sparse_inputs import every_token_sparse as every_token_sparse
    from trimtab.tensors.table import LevelTable as LevelTable
    from trimtab.tensors.table import TableFormat as TableFormat
    from trimtab.tensors.transform import Chain as Chain
    from trimtab.tensors.transform import Transform as Transform

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "ActivationGrid": "activations",
        "Part": "base",
        "BinaryBases": "binary",
        "Bitmap": "bitmap",
        "Codebook": "codebook",
        "CompressedTensor": "compressed",
        "ClipSearch": "grid",
        "GridFormat": "grid",
        "GroupGrid": "grid",
        "LowRank": "low_rank",
        "svd": "low_rank",
        "Metric": "metric",
        "NestedFormat": "nested_scales",
        "Rotation": "rotation",
        "SparseOutliers": "sparse",
        "SparseInputs": "sparse_inputs",
        "every_token_sparse": "sparse_inputs",
        "SparseGrid": "sparse_grid",
        "LevelTable": "table",
        "TableFormat": "table",
        "Chain": "transform",
        "Transform": "transform",
    },
)
