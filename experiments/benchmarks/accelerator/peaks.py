"""Peak rates of devices by the vendors' datasheets, and the share that a program reaches."""

from typing import NamedTuple


class Peak(NamedTuple):
    """Peak rates of one device.

    Attributes:
        float32_flops: Operations a second in products of float32 arrays at JAX's default
            precision: TF32 on NVIDIA's GPUs, bfloat16 on TPUs.
        bfloat16_flops: Operations a second in products of bfloat16 arrays.
        bytes: Bytes a second between the device and its memory.
        source: The datasheet.
    """

    float32_flops: float
    bfloat16_flops: float
    bytes: float
    source: str


PEAKS = {
    "NVIDIA H200": Peak(
        494.7e12, 989.4e12, 4.8e12, "NVIDIA H200 datasheet, SXM; half of the figures with sparsity"
    ),
    "NVIDIA H100 80GB HBM3": Peak(
        494.7e12, 989.4e12, 3.35e12, "NVIDIA H100 datasheet, SXM; half of the figures with sparsity"
    ),
    "NVIDIA A100-SXM4-80GB": Peak(156e12, 312e12, 2.039e12, "NVIDIA A100 datasheet, 80 GB SXM"),
    "NVIDIA A100-SXM4-40GB": Peak(156e12, 312e12, 1.555e12, "NVIDIA A100 datasheet, 40 GB SXM"),
    "TPU v5 lite": Peak(197e12, 197e12, 0.819e12, "Google Cloud documentation of TPU v5e"),
}
"""Peak rates by JAX's `device_kind`."""


def roofline_share(
    device_kind: str, *, flops: float, num_bytes: float, seconds: float, bf16: bool
) -> float | None:
    """Returns the least time that a device needs for a program, divided by the time it took.

    Args:
        device_kind: The device.
        flops: Operations of the program.
        num_bytes: Bytes that the program reads and writes.
        seconds: Its measured time.
        bf16: Whether its products are those of bfloat16 arrays.

    Returns:
        max(FLOPs / peak, bytes / bandwidth) / seconds; `None` for an unknown device.
    """
    peak = PEAKS.get(device_kind)
    if peak is None:
        return None
    rate = peak.bfloat16_flops if bf16 else peak.float32_flops
    return max(flops / rate, num_bytes / peak.bytes) / seconds
