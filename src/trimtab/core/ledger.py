"""Bytes and operations, counted from allocated buffers, never estimated from "bits"."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One stored tensor: the module it belongs to, its role there (codes, scales, weight, bias, ...) and its bytes."""

    module: str
    role: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a model costs. Shared tensors (tied embeddings) are counted once.

    bytes_at_rest           tensor bytes as saved
    resident_bytes          tensor bytes in memory while it runs
    bytes_read_per_token    tensor bytes that one decoded token must read (embedding: one row)
    kv_bytes_per_token      bytes that the key-value cache grows by per token
    macs_per_token          multiply-accumulates of the linear layers per token
    baseline_bytes          bytes_at_rest of the same model uncompressed, in the dtype it was loaded in
    compressed_weights      weights held by compressed layers
    compressed_bytes        bytes of everything those layers store: codes, scales, zeros, factors, indices
    """

    bytes_at_rest: int
    resident_bytes: int
    bytes_read_per_token: int
    kv_bytes_per_token: int
    macs_per_token: int
    baseline_bytes: int
    compressed_weights: int
    compressed_bytes: int
    entries: tuple[LedgerEntry, ...] = ()

    @property
    def keep_fraction(self) -> float:
        """Whole-model bytes at rest as a fraction of the uncompressed model's."""
        return self.bytes_at_rest / self.baseline_bytes

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per weight over the compressed layers, everything they store included; None if there are none."""
        return 8 * self.compressed_bytes / self.compressed_weights if self.compressed_weights else None

    def to_dict(self, entries: bool = False) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "entries"}
        data |= {"keep_fraction": self.keep_fraction, "bits_per_weight": self.bits_per_weight}
        if entries:
            data["entries"] = [dataclasses.asdict(e) for e in self.entries]
        return data
