"""Experiments: one script for each question, run as `python -m experiments.NAME`."""

import importlib.metadata
import os

if importlib.metadata.version("jax").startswith("0.10."):
    # On CPUs, XLA of these versions hands convolutions to a library that takes five times as long;
    # it does reductions well. JAX reads the flag when it starts, which is after this module. Other
    # versions do not need the flag, and older ones do not know it.
    flag = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
    os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}".strip()
