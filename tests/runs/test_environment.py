"""Tests of the check that products of matrices follow their weights."""

import os
import subprocess
import sys

import jax
import pytest

from jaxkd.runs import RunError
from jaxkd.runs.environment import check_cpu_products

CODE = "from jaxkd.runs.environment import check_cpu_products; check_cpu_products()"


def test_products_that_follow_their_weights_pass(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
    check_cpu_products()


def test_products_of_outdated_weights_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
    monkeypatch.setattr(jax.numpy, "matmul", lambda inputs, weights: inputs @ (0 * weights))
    with pytest.raises(RunError, match="XLA_FLAGS=--xla_cpu_use_xnnpack=false"):
        check_cpu_products()


@pytest.mark.thorough
def test_a_process_without_the_flag_is_refused_where_jax_needs_it():
    environment = os.environ | {"XLA_FLAGS": ""}
    process = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True)
    # JAX 0.7 needs it on most CPUs. A CPU on which it computes well passes there too.
    refused = b"computes with outdated weights" in process.stderr
    assert process.returncode == (1 if refused else 0)
    assert not refused or jax.__version_info__ < (0, 10)
