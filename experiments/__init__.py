"""Experiments: one readable script each, run as `python -m experiments.NAME`."""

import importlib.metadata
import os

if importlib.metadata.version("jax").startswith("0.10."):
    # XLA of these versions hands convolutions to a library that takes five times as long for them on a CPU; reductions
    # it does well. The flag is read when JAX starts, which is after this module; other versions need none, and older
    # ones do not know it.
    os.environ["XLA_FLAGS"] = (
        f"--xla_cpu_experimental_ynn_fusion_type=-individual_convolution {os.environ.get('XLA_FLAGS', '')}".strip()
    )
