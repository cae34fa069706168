"""Statistics of several sites as one file, so that one calibration pass serves several methods and bit widths."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.core.errors import CheckpointError
from trimtab.core.files import atomic_file
from trimtab.models.statistics import ACCUMULATORS, Stats

STATISTICS_VERSION = 1


def save_statistics(path: str | Path, statistics: Mapping[str, Stats], *, data_sha256: str, dtype: str) -> None:
    """Write statistics of several sites as one safetensors file, atomically.

    Tensors are named `<site>/<statistic>`; the header holds the version, the calibration data's hash, the dtype the
    activations had and the token count of each site. Raises OutputError.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for site, stats in statistics.items():
        for need in ACCUMULATORS:
            if (value := getattr(stats, need)) is not None:
                tensors[f"{site}/{need}"] = value.cpu().contiguous()
    header = {
        "version": str(STATISTICS_VERSION),
        "data_sha256": data_sha256,
        "dtype": dtype,
        "counts": json.dumps({site: stats.count for site, stats in statistics.items()}, sort_keys=True),
    }
    with atomic_file(path, also=(SafetensorError,)) as partial:
        save_file(tensors, partial, metadata=header)


def load_statistics(path: str | Path) -> tuple[dict[str, Stats], dict[str, Any]]:
    """Read what `save_statistics` wrote: statistics by site, and the header's `data_sha256` and `dtype`.

    Raises CheckpointError if the file is missing, damaged, not a statistics file or from a newer version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("version") != str(STATISTICS_VERSION):
                raise CheckpointError(
                    f"{path} is not a statistics file of version {STATISTICS_VERSION} (found {header.get('version')})."
                )
            counts: dict[str, int] = json.loads(header["counts"])
            values: dict[str, dict[str, Tensor]] = {site: {} for site in counts}
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                site, _, need = key.rpartition("/")
                values[site][need] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"statistics file {path} cannot be read: {error}") from None
    known = {field.name for field in dataclasses.fields(Stats)}
    for site, tensors in values.items():
        if unknown := set(tensors) - known:
            raise CheckpointError(f"statistics file {path}: unknown statistics {sorted(unknown)} of site {site}.")
    loaded = {site: Stats(site, counts[site], **tensors) for site, tensors in values.items()}
    return loaded, {"data_sha256": header["data_sha256"], "dtype": header["dtype"]}
