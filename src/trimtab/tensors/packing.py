"""Packing of integer codes into bytes: pure and exact.

The layout is the one the kernels run on, so it is specified and implemented beside them: see
`trimtab.kernels.packing`, which floors above reach through this module.
"""

from trimtab.kernels.packing import BITS as BITS
from trimtab.kernels.packing import pack as pack
from trimtab.kernels.packing import packed_bytes as packed_bytes
from trimtab.kernels.packing import unpack as unpack

__all__ = ["BITS", "pack", "packed_bytes", "unpack"]
