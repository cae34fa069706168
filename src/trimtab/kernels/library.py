"""The compiled kernels: where the library is, whether it fits this package, which instruction sets it may use."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import site
import sysconfig
from pathlib import Path

import torch  # first: the library then shares torch's OpenMP threads; two spinning pools would fight for the cores

from trimtab.core.errors import ConfigError, KernelUnavailable, did_you_mean

log = logging.getLogger("trimtab.kernels")

ABI = 6
"""TT_ABI of native/api.h."""
ISA_VARIABLE = "TRIMTAB_ISA"
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")
"""Slowest first; the index is the library's number."""
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ZERO_DTYPES = DTYPES | {torch.uint8: 3}
"""What zero points may be."""
_FAILURES = {1: "no instruction set it was built for is here", 2: "memory ran out"}
"""What the numbers mean that every native call may answer; 0 is success."""
_BEST = -1
_FILE = "libtrimtab_kernels.so"


class GridWeightStruct(ctypes.Structure):
    """tt_grid_weight of native/api.h."""

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("level_step", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("zero_dtype", ctypes.c_int32),
    )


class SparseWeightStruct(ctypes.Structure):
    """tt_sparse_weight of native/api.h."""

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("bitmap", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
    )


class GatherWeightStruct(ctypes.Structure):
    """tt_gather_weight of native/api.h."""

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("columns", ctypes.c_void_p),
        ("threshold", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("factor_dtype", ctypes.c_int32),
    )


class BlockTermStruct(ctypes.Structure):
    """tt_block_term of native/api.h."""

    _fields_ = (
        ("right", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class BlockLinearStruct(ctypes.Structure):
    """tt_block_linear of native/api.h."""

    _fields_ = (
        ("weight", GridWeightStruct),
        ("sparse", SparseWeightStruct),
        ("gather", GatherWeightStruct),
        ("terms", ctypes.c_void_p),
        ("term_count", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
    )


class BlockNormStruct(ctypes.Structure):
    """tt_block_norm of native/api.h."""

    _fields_ = (("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float))


class BlockStruct(ctypes.Structure):
    """tt_block of native/api.h."""

    _fields_ = (
        *((name, BlockLinearStruct) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, BlockNormStruct) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        ("head_dim", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    )


class LinearProblem(ctypes.Structure):
    """tt_linear_problem of native/api.h."""

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    )


class IntProblem(ctypes.Structure):
    """tt_int_problem of native/api.h."""

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("x_bits", ctypes.c_int32),
        ("x_dtype", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("x_symmetric", ctypes.c_int32),
        ("index_bytes", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    )


class CodebookProblem(ctypes.Structure):
    """tt_codebook_problem of native/api.h."""

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("books", ctypes.c_int64),
        ("entries", ctypes.c_int64),
        ("group_size", ctypes.c_int32),
        ("code_bytes", ctypes.c_int32),
        ("x_dtype", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    )


class TermProblem(ctypes.Structure):
    """tt_term_problem of native/api.h."""

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("x_dtype", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    )


def _places() -> list[Path]:
    """Beside this file; an editable installation leaves it in site-packages instead."""
    roots = [sysconfig.get_paths()["platlib"], *site.getsitepackages()]
    return [Path(__file__).with_name(_FILE), *(Path(root, "trimtab", "kernels", _FILE) for root in roots)]


def _declare(library: ctypes.CDLL) -> None:
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    signatures: dict[str, tuple[object, tuple[object, ...]]] = {
        "tt_openmp": (i32, ()),
        "tt_has_isa": (i32, (i32,)),
        "tt_grid_matmul": (i32, (pointer, i64, pointer, pointer, i64, i32, i32, i32)),
        "tt_grid_dequantize": (i32, (pointer, i64, i64, pointer, i32, i32, i32)),
        "tt_low_rank_add": (i32, (pointer, pointer, pointer, pointer, pointer, i64, i32)),
        "tt_sparse_add": (i32, (pointer, pointer, pointer, pointer, pointer, pointer, i64, i32)),
        "tt_block_before": (i32, (*[pointer] * 4, i64, pointer, i64, i32)),
        "tt_block_after": (i32, (*[pointer] * 4, i64, i32)),
        "tt_half_linear": (i32, (pointer, pointer, pointer, pointer, pointer, i64, i32)),
        "tt_codebook_matmul": (i32, (*[pointer] * 6, i64, i32)),
        "tt_codebook_dequantize": (i32, (*[pointer] * 5, i64, i32)),
        "tt_sparse_matmul": (i32, (pointer, i64, pointer, pointer, i64, i32, i32, i32)),
        "tt_sparse_dequantize": (i32, (pointer, i64, i64, pointer, i32, i32)),
        "tt_gather_matmul": (i32, (pointer, i64, pointer, pointer, i64, i32, i32, i32)),
        "tt_int_matmul": (i32, (*[pointer] * 7, i64, ctypes.c_float, i32)),
        "tt_kv_attention": (i32, (pointer, pointer, pointer, pointer, i32)),
        "tt_read_seconds": (ctypes.c_double, (pointer, i64, i32)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


@functools.cache
def _opened() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    path = next((place for place in _places() if place.exists()), None)
    if path is None:
        return None, "the native library was not built (installing trimtab found no C++ compiler)"
    try:
        library = ctypes.CDLL(str(path))
        if (found := library.tt_abi()) != ABI:
            return None, f"{path} has interface {found}, this trimtab wants {ABI}; install trimtab anew"
        _declare(library)
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded ({error}); install trimtab anew"
    return library, ""


@functools.cache
def absent() -> str | None:
    """Why there are no native kernels here, or None. Says so once: every product is slower without them."""
    library, reason = _opened()
    if library is None:
        log.warning("trimtab multiplies compressed weights with its PyTorch reference, which is slower: %s.", reason)
        return reason
    return None


def native_library() -> ctypes.CDLL:
    """The loaded library. Raises KernelUnavailable."""
    library, reason = _opened()
    if library is None:
        raise KernelUnavailable(f"Native kernels cannot run: {reason}.")
    return library


def check(status: int) -> None:
    """Raise KernelUnavailable unless a native call answered that all went well."""
    if status:
        raise KernelUnavailable(f"The native kernels stopped: {_FAILURES.get(status, f'status {status}')}.")


@functools.cache
def machine_isas() -> tuple[str, ...]:
    """Instruction sets that the library was built for and this processor has, slowest first."""
    library = native_library()
    return tuple(name for number, name in enumerate(ISAS) if library.tt_has_isa(number))


def isa_limit() -> int:
    """The library's number of the best instruction set allowed: TRIMTAB_ISA, or -1 for what the machine has.

    Raises ConfigError for an unknown name and KernelUnavailable for one that is not here.
    """
    return _isa_number(os.environ.get(ISA_VARIABLE, ""))


@functools.cache
def _isa_number(name: str) -> int:
    if not name:
        return _BEST
    if name not in ISAS:
        raise ConfigError(f"{ISA_VARIABLE}={name} is no instruction set. {did_you_mean(name, ISAS)}")
    if name not in machine_isas():
        raise KernelUnavailable(f"{ISA_VARIABLE}={name} cannot run: here are {', '.join(machine_isas())}.")
    return ISAS.index(name)
