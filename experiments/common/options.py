"""Options that experiments share, and what follows from them: steps, precision, placement."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.common.cli import require
from jaxkd import distill, models
from jaxkd.cli.limits import LARGEST_INTEGER

SMALL_BATCH = 1024
"""Batches up to this size are possible whatever the number of examples."""
MAX_STUDENTS = 64
"""Largest number of students in one program, unless the user asks for more."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an experiment that runs a plan."""

    num_seeds: int = 3
    """Number of seeds. The whole plan is trained once for each."""
    seed: int = 0
    """The first seed; the others follow it: seed, seed + 1, ..."""
    epochs: int = 10
    """Passes over the training examples, for each network."""
    batch_size: int = 128
    """Number of examples in a training step."""
    learning_rate: float = 1e-3
    """Initial learning rate of Adam. It falls to 0 along a cosine."""
    teacher_cache: str | None = None
    """Folder of cached teacher logits, which runs may share. By default a folder of the run."""
    deterministic: bool = False
    """Makes a GPU compute the same bits at every run, more slowly. A CPU always does; a TPU has no
    such setting."""
    bf16: bool = False
    """Computes in bfloat16, with weights and losses in float32. Faster on GPUs and TPUs."""
    parallel: Literal["jit", "pmap", "none"] = "jit"
    """How several devices share a step: jit compiles one program over all of them, pmap maps it
    over them, none uses the first device."""
    model_devices: int = 1
    """Number of devices that share the weights of each teacher, if it does not fit on one. Needs
    jit."""
    max_students: int = 0
    """Number of students that train in one vectorised program: seeds, and stages with the same
    program. 0 chooses: 1 on a CPU, where more are slower; on accelerators all students, or 1 if
    there are fewer students than devices."""
    coordinator: str = ""
    """On several hosts, all running the same command: address:port of the first one, or auto if JAX
    can detect it."""
    num_processes: int | None = None
    """Number of processes, unless the coordinator is auto."""
    process_id: int | None = None
    """Index of this process, from 0, unless the coordinator is auto."""
    evaluations: int = 10
    """Number of evaluations of each network on the validation images or texts, evenly spread."""
    save_every: float = 15.0
    """Seconds between checkpoints. One is also saved at the end of a stage and on Ctrl-C."""
    workdir: str | None = None
    """Directory of the run. By default a directory in runs/ named after data and options. The same
    command resumes there. Other options keep the trainings there that they do not change, and
    replace the others."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        require(self.num_seeds >= 1, f"--num-seeds {self.num_seeds}: needs at least 1")
        last_seed = self.seed + self.num_seeds - 1
        require(
            0 <= self.seed and last_seed <= LARGEST_INTEGER,
            f"--seed {self.seed}: the seeds must be from 0 to {LARGEST_INTEGER}",
        )
        require(self.epochs >= 1, f"--epochs {self.epochs}: needs at least 1")
        require(self.batch_size >= 1, f"--batch-size {self.batch_size}: needs at least 1")
        require(
            self.learning_rate > 0 and math.isfinite(self.learning_rate),
            f"--learning-rate {self.learning_rate}: must be above 0",
        )
        require(
            self.evaluations >= 1,
            f"--evaluations {self.evaluations}: needs at least 1, the one at the end",
        )
        require(self.save_every >= 0, f"--save-every {self.save_every}: needs at least 0 seconds")
        self._check_placement()

    def _check_placement(self) -> None:
        num_devices = jax.device_count()
        require(
            self.model_devices >= 1 and num_devices % self.model_devices == 0,
            f"--model-devices {self.model_devices}: must divide the {num_devices} devices",
        )
        require(
            self.parallel == "jit" or self.model_devices == 1,
            f"--model-devices {self.model_devices}: only --parallel jit divides weights",
        )
        require(
            self.max_students >= 0,
            f"--max-students {self.max_students}: needs 1 or more, or 0 for what suits the device",
        )
        is_plain_jit = self.parallel != "pmap" and self.model_devices == 1
        require(
            self.max_students <= 1 or is_plain_jit,
            f"--max-students {self.max_students}: students in one program train without pmap and "
            "--model-devices",
        )
        require(
            self.parallel != "pmap" or self.batch_size % num_devices == 0,
            f"--batch-size {self.batch_size}: pmap needs a multiple of the {num_devices} devices; "
            "jit does not",
        )


@dataclasses.dataclass(frozen=True)
class SoftTargetOptions(Options):
    """Options of an experiment that distils with soft targets."""

    temperature: float = 4.0
    """Temperature of the soft targets, above 0."""
    alpha: float = 0.9
    """Weight of the soft targets, from 0 to 1. The labels have the rest."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        super().check()
        require(
            self.temperature > 0 and math.isfinite(self.temperature),
            f"--temperature {self.temperature}: must be above 0; 1 leaves the logits as they are",
        )
        require(
            0 <= self.alpha <= 1,
            f"--alpha {self.alpha}: the weight of the soft targets must be from 0 to 1",
        )


def num_steps(options: Options, num_examples: int, *, epochs: int | None = None) -> int:
    """Returns the number of steps of the options' epochs, or of `epochs`, over the examples.

    Raises:
        OptionError: If there are more steps than a step counter of 32 bits can hold.
    """
    epochs = options.epochs if epochs is None else epochs
    # In integers, because a float cannot hold a large product.
    steps = -(-epochs * num_examples // options.batch_size)
    require(
        steps <= LARGEST_INTEGER,
        f"{epochs:,} epochs of {num_examples:,} examples are {steps:,} steps, of which "
        f"{LARGEST_INTEGER:,} are possible: choose fewer --epochs",
    )
    return steps


def check_batch_size(options: Options, num_examples: int) -> None:
    """Raises `OptionError` if a batch would hold every example many times."""
    # A few examples may fill a batch of the usual size more than once.
    largest = max(num_examples, SMALL_BATCH)
    require(
        options.batch_size <= largest,
        f"--batch-size {options.batch_size}: there are only {num_examples:,} training examples; "
        f"choose at most {largest}",
    )


def make_model(module: Any, options: Options) -> models.Model:
    """Makes a model from a Flax Linen module, in the precision of the options."""
    model = models.from_linen(module)
    return models.with_compute_dtype(model, jnp.bfloat16) if options.bf16 else model


def make_placement(
    options: Options, plan: Sequence[distill.Stage | distill.Pretrained]
) -> distill.Placement:
    """Returns where a plan trains, as the options say.

    Args:
        options: The options.
        plan: The plan. On accelerators, its stages with the same program train together.
    """
    if options.parallel == "pmap":
        return distill.PmapPlacement()
    devices = jax.local_devices()[:1] if options.parallel == "none" else None
    mesh = distill.make_mesh(model=options.model_devices, devices=devices)
    max_students = options.max_students or _default_max_students(options, mesh, plan)
    if max_students > 1:
        return distill.VectorizedPlacement(mesh, max_students)
    return distill.MeshPlacement(mesh)


def _default_max_students(
    options: Options, mesh: jax.sharding.Mesh, plan: Sequence[distill.Stage | distill.Pretrained]
) -> int:
    """Returns the number of students in one program where the user does not choose it."""
    if options.model_devices > 1 or mesh.devices.flat[0].platform == "cpu":
        return 1
    students = options.num_seeds * distill.count_concurrent_stages(plan)
    # With fewer students than devices, some devices would be idle.
    return 1 if students < mesh.size else min(students, MAX_STUDENTS)
