"""Probes see what is allocated and give figures with units."""

from __future__ import annotations

import mmap
import time

import pytest
import torch
from transformers import LlamaForCausalLM

from trimtab.core.errors import BudgetError, ConfigError
from trimtab.evaluation.probes import live_tensor_bytes, measure_speed, memory, peak_memory

MIB = 1 << 20


@pytest.mark.parametrize("exact", [True, False])
def test_peak_memory_sees_what_is_freed_again(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exact:
        monkeypatch.setattr(memory, "_reset_peak", lambda: False)
    with peak_memory() as peak:
        # not from the allocator, which may hold as much that is free from tests before this one
        block = mmap.mmap(-1, 64 * MIB)
        for page in range(0, 64 * MIB, mmap.PAGESIZE):
            block[page] = 1
        if not exact:
            time.sleep(0.5)  # samples are 5 ms apart, more where the machine is busy
        block.close()
    assert 55 * MIB < peak.added_rss_bytes < 200 * MIB
    if exact and not peak.exact:
        pytest.skip("this system does not let a process reset its recorded peak")
    assert peak.exact == exact
    with peak_memory() as idle:
        pass
    assert idle.added_rss_bytes < 8 * MIB


def test_live_tensor_bytes_counts_shared_storage_once() -> None:
    before = live_tensor_bytes("cpu")
    block = torch.ones(1000)
    view = block[:10]
    assert live_tensor_bytes("cpu") - before == 4000
    assert live_tensor_bytes() >= live_tensor_bytes("cpu")
    del block
    assert live_tensor_bytes("cpu") - before == 4000  # the view keeps the storage alive
    del view
    assert live_tensor_bytes("cpu") == before
    torch.ones(10, device="meta")
    assert live_tensor_bytes("cpu") == before


def test_speed_is_consistent(model: LlamaForCausalLM) -> None:
    speed = measure_speed(model, prompt_tokens=16, new_tokens=4, batch=2, repeats=3)
    assert speed.decode_tokens_per_second_median == pytest.approx(2000 / speed.decode_ms_median)
    assert speed.prefill_tokens_per_second_median == pytest.approx(32 / speed.prefill_s_median)
    assert speed.threads == torch.get_num_threads()
    assert set(speed.to_dict()) >= {"decode_ms_median", "prefill_s_median", "threads", "repeats"}


def test_speed_refuses_what_does_not_fit(model: LlamaForCausalLM) -> None:
    with pytest.raises(BudgetError, match="128"):
        measure_speed(model, prompt_tokens=120, new_tokens=9)
    with pytest.raises(ConfigError, match="repeats"):
        measure_speed(model, repeats=0)
