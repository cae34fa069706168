"""Floor 1: quantize, prune and factorise the linear layers. Read base.py first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.core.lazy import lazy_exports
from trimtab.core.registry import room_exports

if TYPE_CHECKING:
    from trimtab.weights.awq import Awq as Awq
    from trimtab.weights.gblm import Gblm as Gblm
    from trimtab.weights.gptq import Gptq as Gptq
    from trimtab.weights.hqq import Hqq as Hqq
    from trimtab.weights.loftq import Loftq as Loftq
    from trimtab.weights.lq_lora import LqLora as LqLora
    from trimtab.weights.magnitude import Magnitude as Magnitude
    from trimtab.weights.mergequant import Mergequant as Mergequant
    from trimtab.weights.mixed import Mixed as Mixed
    from trimtab.weights.modegpt import MoDeGpt as MoDeGpt
    from trimtab.weights.neurons import Neurons as Neurons
    from trimtab.weights.nf import Nf as Nf
    from trimtab.weights.prunenet import PruneNet as PruneNet
    from trimtab.weights.pv_tuning import PvTuning as PvTuning
    from trimtab.weights.qbb import Qbb as Qbb
    from trimtab.weights.qllm import Qllm as Qllm
    from trimtab.weights.rtn import Rtn as Rtn
    from trimtab.weights.sparsegpt import Sparsegpt as Sparsegpt
    from trimtab.weights.vq import Vq as Vq
    from trimtab.weights.wanda import Wanda as Wanda

__getattr__, __dir__ = lazy_exports(__name__, room_exports("weights"))
