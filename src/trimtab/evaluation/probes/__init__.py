"""Measurements of memory and speed; every figure says its unit in its name."""

from trimtab.evaluation.probes.memory import PeakMemory, live_tensor_bytes, peak_memory
from trimtab.evaluation.probes.speed import Speed, measure_speed

__all__ = ["PeakMemory", "Speed", "live_tensor_bytes", "measure_speed", "peak_memory"]
