"""Floor 3: whether each published system does what its paper says, measured here. Read base.py first.

One file per system, named as its method. Names are imported on first use, so that listing needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports

if TYPE_CHECKING:
    from trimtab.claims._run import claim_names as claim_names
    from trimtab.claims._run import claims_of as claims_of
    from trimtab.claims._run import run_claims as run_claims

__getattr__, __dir__ = lazy_exports(__name__, {"claim_names": "_run", "claims_of": "_run", "run_claims": "_run"})
