"""Measures jaxkd on an accelerator that is at hand for a few minutes, beside PyTorch.

A queue of measurements, the most useful first: agreement with a CPU; training steps, vectorised
students and fused losses, in time and memory; a whole distillation on CIFAR-10; a training that is
killed and goes on; rows of accuracies by method. Each measurement runs in a process of its own and
leaves a file of results as it ends. The same command goes on where an earlier one stopped, ended
or was killed, and skips what this device has measured with the same options and the same jaxkd. A
measurement of several parts, or a training, goes on with what it had.

It needs jax, flax, optax, orbax-checkpoint and filelock, and Pillow for the images. PyTorch is
measured where it is installed. No network is needed: the images come from a folder that
`python -m experiments.benchmarks.accelerator.pack` makes beforehand on a machine that has them.

Command: python -m experiments.benchmarks.accelerator --pack runs/accelerator_kit --minutes 25
On any CPU, at toy sizes: python -m experiments.benchmarks.accelerator --tiny

The tables of docs/results/accelerators.md are made from the files of results by
`python -m experiments.benchmarks.accelerator.report`.

Time: at most --minutes; the whole queue is expected to take an hour on an H100
"""
