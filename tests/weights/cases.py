"""One line per method and set of options; the shared suite runs every check on every line.

The random models are 48 and 112 wide, so groups are of 16 or whole rows here.
"""

from __future__ import annotations

from typing import Any

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
    ("awq", {"bits": 4, "group_size": 16}),
    ("awq", {"bits": 3, "group_size": -1, "symmetric": True, "scaling": "plain"}),
]

IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, options in CASES]
