"""Shared by all tests: few threads, fixed seeds, and the reference model loaded once."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tests run in several processes; one OpenMP thread each, or they slow each other down several-fold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The project works offline, and so do its tests.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A busy machine is no failure: no deadline. The same examples each time: a red run can be repeated.
settings.register_profile("trimtab", deadline=None, derandomize=True)
settings.load_profile("trimtab")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    import random
    import sys

    random.seed(0)
    if "torch" in sys.modules:
        import numpy
        import torch

        numpy.random.seed(0)
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No test, and so no function of ours, leaves torch in another mode than it found it in."""
    import sys

    yield
    if "torch" in sys.modules:
        import torch

        assert torch.is_grad_enabled(), "gradients are left disabled"
        assert not torch.is_inference_mode_enabled(), "inference mode is left on"
        assert torch.get_default_dtype() == torch.float32, f"the default dtype is left at {torch.get_default_dtype()}"


@pytest.fixture(scope="session")
def ref_model() -> PreTrainedModel:
    """The shipped reference model, shared by all tests: do not change it; take `fresh_ref` for that."""
    import trimtab as tt

    model = tt.load("ref")
    model.requires_grad_(False)
    return model


@pytest.fixture(scope="session")
def ref_tokenizer(ref_model: PreTrainedModel) -> PreTrainedTokenizerBase:
    return ref_model.trimtab.tokenizer


@pytest.fixture
def fresh_ref(ref_model: PreTrainedModel) -> Callable[[], PreTrainedModel]:
    """Makes copies of the reference model that a test may change."""
    return lambda: copy.deepcopy(ref_model)
