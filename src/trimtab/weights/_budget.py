"""A number of bytes that a user asked for, as a share of a model or as a size."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from trimtab.core.errors import ConfigError

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
_SIZE = re.compile(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Budget:
    """Either a share of what the whole model takes in bfloat16, or a number of bytes."""

    share: float | None = None
    nbytes: int | None = None

    @classmethod
    def of(cls, budget: float | str) -> Budget:
        """Read 0.2 or "0.2" (a share), "20%", 400e6 or "400MB" (bytes; 1 MB = 10^6, 1 MiB = 2^20).

        A number without a unit is a share up to 1 and bytes above. Raises ConfigError for what is neither.
        """
        text = str(budget)
        percent = text.strip().endswith("%")
        match = _SIZE.fullmatch(text.strip().removesuffix("%"))
        unit = match.group(2).lower() if match else ""
        try:
            number = float(match.group(1)) if match else math.nan
        except ValueError:
            number = math.nan
        if not (number > 0 and math.isfinite(number)) or unit not in _UNITS or (percent and unit):
            raise ConfigError(
                f"budget {budget!r} is not a share of the model's bytes in bfloat16 (0.2, 20%) or a size "
                "(400MB, 1.5GiB)."
            )
        if percent or (not unit and number <= 1):
            share = number / 100 if percent else number
            if share > 1:
                raise ConfigError(f"budget {budget!r} is more than the whole model in bfloat16.")
            return cls(share=share)
        return cls(nbytes=int(number * _UNITS[unit]))

    def resolve(self, bfloat16_bytes: int) -> int:
        """The number of bytes, for a model that takes `bfloat16_bytes`."""
        if self.nbytes is not None:
            return self.nbytes
        assert self.share is not None
        return int(self.share * bfloat16_bytes)
