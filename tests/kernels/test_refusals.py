"""Why native and Triton kernels refuse tensors, and what a native call's status means: the same for all operations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import KernelUnavailable
from trimtab.kernels import library, triton_device
from trimtab.kernels.refusals import FLOATS, refused

WIDE = torch.zeros(4, 8)
FITTING: dict[str, Tensor | None] = {"x": WIDE.t(), "codes": torch.zeros(4, dtype=torch.uint8), "zeros": None}
CASES: list[tuple[dict[str, Tensor], str]] = [
    ({"codes": FITTING["codes"].to("meta")}, "codes is on meta"),  # type: ignore[union-attr]
    ({"codes": WIDE.t()}, r"codes of shape [8, 4] is not contiguous"),
    ({"x": WIDE.double()}, "x is torch.float64"),
    ({"zeros": WIDE.clone().requires_grad_()}, "a gradient is wanted"),
]


@pytest.mark.parametrize(("change", "words"), CASES, ids=[words for _, words in CASES])
def test_each_reason_alone(change: dict[str, Tensor], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The triton check as the interpreter sees it, on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for check, kernels in ((refused, "native"), (triton_device.refused, "Triton")):
        assert check(FITTING, ("x", "zeros")) is None
        reason = str(check(FITTING | change, ("x", "zeros")))
        assert words in reason
        if "torch.float64" in words or "meta" in words:
            assert kernels in reason


def test_only_what_matters_is_refused() -> None:
    assert refused({"x": WIDE.double()}, ()) is None
    assert refused({"query": WIDE.t()}, ("query",), strided=("query",)) is None
    with torch.no_grad():
        assert refused({"x": WIDE.clone().requires_grad_()}, ("x",)) is None
    assert set(library.DTYPES) == FLOATS


def test_triton_wants_a_gpu_unless_it_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "x is on cpu; Triton kernels want a cuda device" in str(triton_device.refused(FITTING, ("x",)))


def test_status_of_a_native_call() -> None:
    library.check(0)
    for status, words in ((1, "no instruction set"), (2, "memory ran out"), (9, "status 9")):
        with pytest.raises(KernelUnavailable, match=f"The native kernels stopped: {words}"):
            library.check(status)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tiles_cover_everything_once(bits: int) -> None:
    for rows, in_features in itertools.product((1, 2, 8, 33), (1, 63, 64, 704, 4000)):
        cut = triton_device.packed_tiles(rows, 100, in_features, bits, torch.device("cpu"))
        constants, codes = cut.constants, cut.constants["CODES"]
        assert cut.grid[0] * constants["BLOCK_O"] >= 100 > (cut.grid[0] - 1) * constants["BLOCK_O"]
        assert cut.grid[1] * constants["BLOCK_B"] >= rows > (cut.grid[1] - 1) * constants["BLOCK_B"]
        assert cut.splits * cut.per_split >= cut.blocks >= (cut.splits - 1) * cut.per_split
        tiles = cut.grid[0] * cut.grid[1]
        assert tiles * cut.splits <= max(tiles, triton_device.wanted_programs(torch.device("cpu")))
        rest = in_features - cut.blocks * 32 * codes
        assert 0 <= rest <= cut.tail_lanes * codes < rest + codes
        assert cut.tail_lanes <= 32
