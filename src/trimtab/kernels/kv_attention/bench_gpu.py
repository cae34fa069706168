"""Speed of kv_attention on a GPU beside PyTorch's attention over dense float16 keys and values.

    python -m trimtab.kernels.kv_attention.bench_gpu     a table on stderr, the entries as JSON on stdout

Needs a CUDA device. One decode step of 32 query and 8 KV heads of 128 channels over a KIVI cache (arXiv:2402.02750):
groups of 32, then a window of 128 exact tokens. Ours is compared with the float32 reference before it is timed, and no
speed is given if they differ. The L2 cache is flushed before each timed call.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import KernelUnavailable, NumericsError, TrimtabError
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.kv_attention import triton
from trimtab.kernels.kv_attention.reference import kv_attention_reference
from trimtab.kernels.kv_attention.run import Lane, Run, tiles
from trimtab.kernels.kv_attention.triton_tables import make_tables

_DIM, _QUERY_HEADS, _KV_HEADS, _GROUP, _WINDOW = 128, 32, 8, 32, 128
_ROUNDS = 30
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Setting:
    """Rows of the batch, and tokens of each, window included."""

    rows: int
    tokens: int


SETTINGS = tuple(Setting(rows, tokens) for tokens in (8192, 32768) for rows in (1, 16))
BITS = (2, 4)


def kv_attention_gpu_bench(settings: Sequence[Setting] = SETTINGS, bits: Sequence[int] = BITS) -> list[dict[str, Any]]:
    """One entry per setting and system. Raises KernelUnavailable without a CUDA device, NumericsError if parity is red.

    device_ms         median time of the launches alone, from a CUDA graph
    call_ms           median time of a call, the making of the tables included
    ratio             device_ms of PyTorch's attention over that of the entry: above 1 is faster
    bandwidth_share   bytes of keys and values read per second of device_ms, of what plain reading reaches
    """
    if not torch.cuda.is_available():
        raise KernelUnavailable("the benchmark of kv_attention on GPUs needs a CUDA device, and this machine has none.")
    if reason := triton.absent():
        raise KernelUnavailable(f"the benchmark of kv_attention on GPUs cannot run: {reason}.")
    bandwidth = _read_gbps()
    entries = []
    for setting in settings:
        query = torch.randn(setting.rows, _QUERY_HEADS, 1, _DIM, dtype=torch.float16, device="cuda")
        found = [_dense_entry(setting, query)]
        found += [_coded_entry(setting, query, b) for b in bits]
        for entry in found:
            gbps = entry["kv_bytes"] / entry["device_ms"] / 1e6
            entry |= {"ratio": found[0]["device_ms"] / entry["device_ms"], "bandwidth_share": gbps / bandwidth}
        entries += found
    return entries


def _coded_entry(setting: Setting, query: Tensor, bits: int) -> dict[str, Any]:
    lanes = [_lane(row, setting.tokens, bits, query.device) for row in range(setting.rows)]
    scale = _DIM**-0.5
    if reason := triton.refuses(query, lanes, scale=scale):
        raise KernelUnavailable(f"kv_attention at {bits} bits cannot run in Triton: {reason}.")

    def call() -> Tensor:
        return triton.kv_attention_triton(query, lanes, scale=scale)[0]

    last = setting.rows - 1
    expected, _ = kv_attention_reference(query[last:].float(), [_as_row_0(lanes[last])], scale=scale)
    _demand_parity(call()[last:], expected, f"trimtab/kivi-{bits}")
    tables = make_tables(lanes, triton.item_tokens(lanes, query.device), query.device)
    queries = triton.queries_per_head(query, lanes)
    nbytes = sum(t.nbytes for lane in lanes for run in (*lane.keys, *lane.values) for t in run.tensors().values())
    device_ms = _device_ms(lambda: triton.attend(query, tables, queries, scale=scale)[0])
    return _entry(f"trimtab/kivi-{bits}", setting, device_ms, _milliseconds(call), nbytes)


def _dense_entry(setting: Setting, query: Tensor) -> dict[str, Any]:
    shape = (setting.rows, _KV_HEADS, setting.tokens, _DIM)
    keys, values = (torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(2))

    def call() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return _entry("torch/sdpa-fp16", setting, _device_ms(call), _milliseconds(call), keys.nbytes + values.nbytes)


def _lane(row: int, tokens: int, bits: int, device: torch.device) -> Lane:
    """A lane of random codes, all KV heads."""
    coded = tokens - _WINDOW
    window = [_exact(torch.randn(_KV_HEADS, _WINDOW, _DIM, dtype=torch.float16, device=device)) for _ in range(2)]
    by_token = (_KV_HEADS, -(-coded // _GROUP), _DIM)
    by_channel = (_KV_HEADS * _DIM // _GROUP, 32 * tiles(coded))
    key = _grid(coded, bits, by_token, device, group_tokens=_GROUP)
    value = _grid(coded, bits, by_channel, device, group_channels=_GROUP)
    return Lane(row, tuple(range(_KV_HEADS)), (key, window[0]), (value, window[1]))


def _grid(tokens: int, bits: int, parameters: tuple[int, ...], device: torch.device, **group: Any) -> Run:
    shape = (_KV_HEADS, tiles(tokens), _DIM, 4 * bits)
    return Run(
        tokens=tokens,
        heads=_KV_HEADS,
        head_dim=_DIM,
        bits=bits,
        codes=torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
        scale=torch.rand(parameters, device=device).half() / (1 << bits),
        minimum=torch.randn(parameters, device=device).half(),
        **group,
    )


def _exact(values: Tensor) -> Run:
    return Run(tokens=values.shape[1], heads=values.shape[0], head_dim=values.shape[2], exact=values)


def _as_row_0(lane: Lane) -> Lane:
    return Lane(0, lane.heads, lane.keys, lane.values)


def _demand_parity(found: Tensor, expected: Tensor, system: str) -> None:
    error = float((found.float() - expected).norm() / expected.norm())
    if not error <= RMS_BOUND[found.dtype]:  # NaN is red too
        raise NumericsError(
            f"{system}: relative RMS error {error:.2e} against the reference is above the bound "
            f"{RMS_BOUND[found.dtype]:.0e}; its speed is not reported."
        )


def _device_ms(call: Callable[[], Tensor]) -> float:
    """Of what a call does on the device, replayed from a CUDA graph: no time between launches."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return _milliseconds(graph.replay)


def _milliseconds(call: Callable[[], object]) -> float:
    """The median over calls with a cold L2 cache."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for _ in range(_ROUNDS + 3):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def _read_gbps() -> float:
    """10^9 bytes per second that a sum over 1 GiB reads."""
    buffer = torch.ones(1 << 28, device="cuda")
    return buffer.nbytes / _milliseconds(lambda: buffer.sum()) / 1e6


def _entry(system: str, setting: Setting, device_ms: float, call_ms: float, nbytes: int) -> dict[str, Any]:
    return {
        "bench": "kv-attention-gpu",
        "system": system,
        "setting": f"{setting.tokens} tokens, batch {setting.rows}",
        "device_ms": device_ms,
        "call_ms": call_ms,
        "kv_bytes": nbytes,
        "device": torch.cuda.get_device_name(),
    }


def main() -> int:
    """Print the table and the entries; 1 where the benchmark cannot run."""
    try:
        entries = kv_attention_gpu_bench()
    except TrimtabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for e in entries:
        print(
            f"{e['setting']:>24}  {e['system']:<16} {e['device_ms']:8.3f} ms on the device, "
            f"{e['call_ms']:8.3f} ms a call, {e['ratio']:5.2f} x SDPA, {e['bandwidth_share']:4.0%} of read bandwidth",
            file=sys.stderr,
        )
    print(json.dumps(entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
