"""One line per method and set of options; the shared suite runs every check on every line.

The random models are 48 and 112 wide, so groups are of 16 or whole rows here.
"""

from __future__ import annotations

from typing import Any

from trimtab.weights._pruning.selection import Sparsity

CASES: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {"bits": 4, "group_size": 16}),
    ("rtn", {"bits": 3, "group_size": -1, "symmetric": True}),
    ("rtn", {"bits": 2, "group_size": 16, "clip": "mse"}),
    ("rtn", {"bits": 8, "group_size": 16, "clip": "imatrix", "scale_dtype": "float32"}),
    ("gptq", {"bits": 4, "group_size": 16}),
    ("gptq", {"bits": 3, "group_size": -1, "symmetric": True, "block_size": 10}),
    ("gptq", {"bits": 2, "group_size": 16, "act_order": True}),
    ("gptq", {"bits": 3, "group_size": 16, "static_groups": True, "clip": "imatrix"}),
    ("nf", {"bits": 4, "group_size": 16}),
    ("nf", {"bits": 3, "group_size": -1, "scale_dtype": "float32"}),
    ("nf", {"bits": 2, "group_size": 16, "double_quant": True}),
    ("hqq", {"bits": 4, "group_size": 16}),
    ("hqq", {"bits": 2, "group_size": -1, "p": 0.5, "scale_dtype": "bfloat16"}),
    ("loftq", {"bits": 4, "group_size": 16, "rank": 2}),
    ("loftq", {"bits": 2, "group_size": 16, "rank": 2, "double_quant": True, "high_blocks": 1}),
    ("loftq", {"bits": 3, "group_size": -1, "rank": 2, "quantizer": "uniform", "init": "svd"}),
    ("loftq", {"bits": 3, "group_size": 16, "rank": 2, "quantizer": "grid", "metric": "gram", "iterations": 2}),
    ("loftq", {"bits": 2, "group_size": 16, "rank": 3, "metric": "diagonal", "factor_dtype": "bfloat16"}),
    ("qbb", {"bits": 4, "holistic": False}),
    ("qbb", {"bits": 3, "sequences": 16, "length": 8, "constant": True, "scale_dtype": "float32"}),
    ("qbb", {"bits": 2, "refine": "gradient", "start": "gptq", "holistic": False}),
    ("vq", {"bits": 4, "iterations": 3, "data_free": True}),
    ("vq", {"bits": 2, "iterations": 3, "steps": 5}),
    ("pv_tuning", {"bits": 4, "base_options": ("group_size=16",), "steps": 3, "check_every": 1}),
    ("pv_tuning", {"bits": 2, "base": "vq", "base_options": ("iterations=3", "steps=3"), "steps": 2}),
    ("awq", {"bits": 4, "group_size": 16}),
    ("awq", {"bits": 3, "group_size": -1, "symmetric": True, "scaling": "duo"}),
    ("lq_lora", {"budget_bits": 3.5, "rank": 2}),
    ("lq_lora", {"budget_bits": 3.2, "rank": 1, "weighting": "none", "polish": True, "cost_iterations": 3}),
    ("mixed", {"budget": "98kB", "quantizer": "rtn", "widths": (2, 3), "group_sizes": (16,)}),
    ("mixed", {"budget": 0.64, "widths": (2, 4), "group_sizes": (16,), "zero_points": "always"}),
    ("qllm", {"bits": 4, "activation_bits": 8, "search_sequences": 1, "epochs": 1}),
    ("qllm", {"bits": 3, "activation_bits": 8, "group_size": 16, "rank": 0, "search_sequences": 1}),
    ("mergequant", {"bits": 4, "activation_bits": 8}),
    ("mergequant", {"bits": 3, "activation_bits": 8, "rotate": False, "multiple": 16, "skip_first": True}),
    ("magnitude", {"sparsity": 0.35, "value_dtype": "bfloat16"}),
    ("magnitude", {"sparsity": "2:4", "value_dtype": "float16"}),
    ("magnitude", {"sparsity": "40%", "value_dtype": "bfloat16", "within": "model"}),
    ("wanda", {"sparsity": 0.35, "value_dtype": "bfloat16"}),
    ("wanda", {"sparsity": "40%", "value_bits": 4, "value_group": 128}),
    ("wanda", {"sparsity": "4:8", "value_dtype": "bfloat16", "repair": "obs"}),
    ("wanda", {"sparsity": 0.5, "value_dtype": "bfloat16", "within": "model", "repair": "least_squares"}),
    ("sparsegpt", {"sparsity": 0.35, "value_dtype": "bfloat16"}),
    ("sparsegpt", {"sparsity": "2:4", "value_dtype": "float16", "block_size": 20}),
    ("sparsegpt", {"sparsity": 0.35, "value_bits": 4}),
    ("gblm", {"sparsity": 0.35, "value_dtype": "bfloat16", "gradient_memory": "30kB"}),
    ("gblm", {"sparsity": "2:4", "value_dtype": "float16", "norm": "l2", "repair": "obs"}),
]

SLICES: list[tuple[str, dict[str, Any]]] = [
    ("neurons", {"sparsity": 0.3}),
    ("neurons", {"sparsity": 0.3, "score": "random", "repair": "least_squares"}),
    ("neurons", {"sparsity": 0.3, "score": "wanda", "round_to": 8}),
    ("neurons", {"sparsity": 0.1, "score": "energy", "counted": "parameters"}),
    ("neurons", {"sparsity": 0.3, "score": "energy_down", "repair": "least_squares"}),
    ("neurons", {"sparsity": 0.2, "score": "ridge", "counted": "macs", "repair": "least_squares"}),
    ("prunenet", {"sparsity": 0.3, "episodes": 2}),
    ("prunenet", {"sparsity": 0.3, "episodes": 2, "action": "top_k", "update": "on_policy", "repair": "least_squares"}),
    ("modegpt", {"sparsity": 0.3, "export": "uniform", "round_to": 1}),
    ("modegpt", {"sparsity": 0.3, "export": "uniform", "score": "energy_down", "repair": "none"}),
]
"""Methods whose result is a smaller dense model, here with MLPs of one width; for test_slicing_suite.py."""

_SPARSITIES: list[dict[str, Any]] = [{"sparsity": share} for share in (0.7, 0.5, 0.25, 0.1)]

LADDERS: dict[str, list[dict[str, Any]]] = {
    "vq": [{"bits": 2}, {"bits": 4}],  # 3 bits want three codebooks, too many for matrices as small as these
    "pv_tuning": [{"bits": 2}, {"bits": 4}],  # of any base
    "lq_lora": [{"budget_bits": bits} for bits in (2.7, 3.5, 4.5, 8.5)],
    "mixed": [{"budget": budget} for budget in ("71.5kB", "75kB", "83kB")],
    "magnitude": _SPARSITIES,
    "wanda": _SPARSITIES,
    "sparsegpt": _SPARSITIES,
    "gblm": _SPARSITIES,
}
"""Options from coarse to fine of the methods without an option `bits` that says it."""

WITH_FEW_TARGETS: dict[str, dict[str, Any]] = {"mixed": {"budget": "205kB"}}
"""Options that change where most linears stay dense."""


def least_bits(options: dict[str, Any]) -> int:
    """The fewest bits that any matrix may get; 16, or `value_bits`, for each value that is not pruned."""
    if "sparsity" in options:
        return int(options.get("value_bits", 16) * (1 - Sparsity.of(options["sparsity"], "case").share))
    return int(options.get("bits", 2))


def largest_error(options: dict[str, Any]) -> float:
    """What the squared error of a layer may be, relative to the layer."""
    return 0.3 if "sparsity" in options else {2: 0.6, 3: 0.15, 4: 0.03, 8: 1e-3}[least_bits(options)]


IDS, SLICE_IDS = (
    [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, options in cases]
    for cases in (CASES, SLICES)
)
