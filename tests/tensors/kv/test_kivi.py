"""Keys by channel, values by token (sheet of KIVI, arXiv:2402.02750)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.kernels.kv_attention.reference import decode
from trimtab.tensors.kv.codec import KVCodec

from .generator import relative_error, synthetic

BLOCK = synthetic()
BY_CHANNEL = KVCodec(bits=2, group_tokens=32)
BY_TOKEN = KVCodec(bits=2, group_channels=32)


def error(codec: KVCodec, x: Tensor) -> float:
    return relative_error(decode(codec.encode(x[None])[0]), x)


def test_key_channels_share_a_scale_better_than_tokens() -> None:
    """Sheet: .261 against .471 with outlier channels; no difference on Gaussian numbers."""
    assert error(BY_CHANNEL, BLOCK.post) < 0.6 * error(BY_TOKEN, BLOCK.post)
    gauss = torch.randn(8, 512, 64)
    assert error(BY_CHANNEL, gauss) == pytest.approx(error(BY_TOKEN, gauss), rel=0.01)


def test_it_is_the_quantizer_of_the_paper() -> None:
    """x^ = s code + m with m = min and s = (max - min) / (2^b - 1), up to the float16 rounding of m and s."""
    x = BLOCK.post[:, :128]
    for bits in (1, 2, 3, 4):
        groups = x.unflatten(1, (-1, 32))
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        step = (high - low) / (2**bits - 1)
        wanted = ((groups - low) / step).round() * step + low
        got = decode(KVCodec(bits=bits, group_tokens=32).encode(x[None])[0])
        agree = (got - wanted.flatten(1, 2)).abs() < 0.01
        assert float(agree.float().mean()) > 0.997  # a tie may fall to the other side


def test_changing_a_token_changes_only_its_own_group() -> None:
    x = BLOCK.values.clone()
    before_keys, before_values = (decode(c.encode(x[None])[0]) for c in (BY_CHANNEL, BY_TOKEN))
    x[:, 100] += 50
    keys, values = (decode(c.encode(x[None])[0]) for c in (BY_CHANNEL, BY_TOKEN))
    assert set((values != before_values).any(2).any(0).nonzero().flatten().tolist()) == {100}
    assert set((keys != before_keys).any(2).any(0).nonzero().flatten().tolist()) == set(range(96, 128))


def test_more_bits_and_smaller_groups_are_better() -> None:
    by_bits = [error(KVCodec(bits=bits, group_tokens=32), BLOCK.post) for bits in (1, 2, 3, 4, 8)]
    by_group = [error(KVCodec(bits=2, group_tokens=g), BLOCK.post) for g in (-1, 128, 64, 32, 16)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_group == sorted(by_group, reverse=True)
    assert by_bits[-1] < 0.003
