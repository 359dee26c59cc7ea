"""Datasheet numbers of three machines, and what bounds a step on them."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Machine(NamedTuple):
    """Peak rates of one chip of a machine. No step reaches all of them.

    Attributes:
        title: Name of the machine.
        chips: Number of chips that share a batch.
        flops: FLOPs in bfloat16 a second.
        memory: Bytes of its memory a second.
        links: Bytes that a chip sends to others a second.
        host: Bytes from the host to the chip a second.
        sources: Pages with these numbers.
    """

    title: str
    chips: int
    flops: float
    memory: float
    links: float
    host: float
    sources: tuple[str, ...]


SCALING_BOOK = "https://jax-ml.github.io/scaling-book"
MACHINES = (
    Machine(
        "TPU v5e-8",
        chips=8,
        flops=197e12,
        memory=819e9,
        # 400 GB/s in both directions of four ports; a chip in the corner of 2×4 uses two of them.
        links=100e9,
        host=15e9,
        sources=("https://docs.cloud.google.com/tpu/docs/v5e", f"{SCALING_BOOK}/tpus/"),
    ),
    Machine(
        "TPU v6e-8",
        chips=8,
        flops=918e12,
        memory=1638e9,
        # 800 GB/s, as above.
        links=200e9,
        host=32e9,
        sources=("https://docs.cloud.google.com/tpu/docs/v6e", f"{SCALING_BOOK}/tpus/"),
    ),
    Machine(
        "8 × H100 SXM",
        chips=8,
        flops=990e12,
        memory=3350e9,
        # NVLink: 900 GB/s in both directions.
        links=450e9,
        # 504 GB/s for the eight of a DGX.
        host=63e9,
        sources=(
            f"{SCALING_BOOK}/gpus/",
            "https://github.com/mlcommons/inference_results_v4.1/blob/main/closed/NVIDIA/systems/"
            "DGX-H100_H100-SXM-80GBx8_TRT.json",
        ),
    ),
)


class Line(NamedTuple):
    """Seconds of a step as a function of the batch: `fixed + batch * per_example`."""

    fixed: float
    per_example: float

    def at(self, batch: float) -> float:
        """Returns the seconds at a batch size."""
        return self.fixed + batch * self.per_example

    @classmethod
    def through(cls, first: tuple[float, float], second: tuple[float, float]) -> "Line":
        """Makes the line through two pairs of batch and seconds."""
        slope = (second[1] - first[1]) / (second[0] - first[0])
        return cls(first[1] - first[0] * slope, slope)


def find_bounds(lines: Mapping[str, Line]) -> list[tuple[int, str]]:
    """Finds which resource takes longest, if all work at the same time.

    Args:
        lines: The seconds of each resource.

    Returns:
        The resource that bounds a batch of 1, and the batches from which another one does.

    Example:
        >>> find_bounds({"links": Line(6.0, 0.0), "compute": Line(0.0, 2.0)})
        [(1, 'links'), (3, 'compute')]
    """
    bound = max(lines, key=lambda name: (lines[name].at(1), lines[name].per_example))
    bounds = [(1, bound)]
    while True:
        line = lines[bound]
        crossings = [
            ((line.fixed - other.fixed) / (other.per_example - line.per_example), name)
            for name, other in lines.items()
            if other.per_example > line.per_example
        ]
        if not crossings:
            return bounds
        batch, bound = min(crossings)
        bounds.append((math.ceil(batch), bound))
