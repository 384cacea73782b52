"""A guess of the time from operations and a device's datasheet."""

from __future__ import annotations

from grads_dist.estimate.flops import Flops
from grads_dist.estimate.hardware import Hardware


def guessed_seconds(flops: Flops, hardware: Hardware, is_float32: bool, ranks: int) -> tuple[float, float]:
    """Shortest and longest time of a pass that `ranks` devices share without waiting for each other.

    Statistics are formed in float32, so on a GPU at the rate of that.
    """
    rate = hardware.tflops_float32 if is_float32 else hardware.tflops
    ideal = (flops.total - flops.in_float32) / rate + flops.in_float32 / hardware.tflops_float32
    least, most = hardware.utilisation
    return ideal / 1e12 / ranks / most, ideal / 1e12 / ranks / least
