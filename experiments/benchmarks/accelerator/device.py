"""The device that is measured."""

import re
from typing import NamedTuple

import jax


class Device(NamedTuple):
    """The device that is measured.

    Attributes:
        kind: The vendor's name of it, such as "NVIDIA H200".
        count: Number of devices of this process.
        platform: "cpu", "gpu" or "tpu".
    """

    kind: str
    count: int
    platform: str

    @property
    def folder_name(self) -> str:
        """The name of its folder, such as `nvidia_h200`."""
        return re.sub(r"\W+", "_", self.kind.lower()).strip("_") or self.platform


def find_device() -> Device:
    """Returns the device on which JAX computes."""
    device = jax.devices()[0]
    return Device(device.device_kind, jax.device_count(), device.platform)
