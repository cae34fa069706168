"""Bytes and operations against a count by hand."""

from __future__ import annotations

import torch

from trimtab.models import ledger_of
from trimtab.models.random import random_model

from .compressing import compress_all

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 50, "head_dim": 8}


def test_llama_by_hand() -> None:
    linear = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32
    norms, table, rotary = 7 * 32, 50 * 32, 2 * 4 * 4  # rotary: inv_freq and its original, float32
    ledger = ledger_of(random_model("llama", dtype=torch.bfloat16, **SIZES))
    assert ledger.bytes_at_rest == ledger.baseline_bytes == 2 * (3 * linear + norms + 2 * table)
    assert ledger.resident_bytes == ledger.bytes_at_rest + rotary
    assert ledger.bytes_read_per_token == ledger.resident_bytes - 2 * (table - 32)
    assert ledger.kv_bytes_per_token == 3 * 2 * 2 * 8 * 2
    assert ledger.macs_per_token == 3 * linear + table
    assert ledger.bits_per_weight is None
    assert ledger.keep_fraction == 1


def test_a_tied_table_is_stored_once_and_read_whole() -> None:
    untied = ledger_of(random_model("llama", **SIZES))
    tied = ledger_of(random_model("llama", tie_word_embeddings=True, **SIZES))
    assert tied.bytes_at_rest == untied.bytes_at_rest - 4 * 50 * 32
    assert tied.bytes_read_per_token == untied.bytes_read_per_token - 4 * 32  # the one row is part of the head
    assert tied.macs_per_token == untied.macs_per_token


def test_learned_positions_are_read_by_row() -> None:
    small = ledger_of(random_model("gpt2", n_positions=64))
    large = ledger_of(random_model("gpt2", n_positions=1064))
    assert large.bytes_at_rest - small.bytes_at_rest == 4 * 1000 * 48
    assert large.bytes_read_per_token == small.bytes_read_per_token


def test_compressed_layers_by_hand() -> None:
    model = random_model("llama", dtype=torch.bfloat16, **SIZES)
    dense = ledger_of(model)
    ledger = ledger_of(compress_all(model, bits=4))
    weights = 3 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32)
    stored = weights // 2 + weights // 16 * (2 + 1)  # codes, then a float16 scale and a byte of zero per group
    assert ledger.compressed_weights == weights
    assert ledger.compressed_bytes == stored
    assert ledger.bits_per_weight == 4 + 3 * 8 / 16
    assert ledger.bytes_at_rest == dense.bytes_at_rest - 2 * weights + stored
    assert ledger.baseline_bytes == dense.bytes_at_rest
    assert ledger.macs_per_token == dense.macs_per_token


def test_entries_sum_up_and_name_their_role() -> None:
    ledger = ledger_of(compress_all(random_model("gpt2")))
    assert sum(entry.nbytes for entry in ledger.entries) == ledger.bytes_at_rest
    roles = {entry.role for entry in ledger.entries if entry.module == "transformer.h.0.attn.c_attn"}
    assert roles == {"codes", "scales", "zeros", "bias"}
