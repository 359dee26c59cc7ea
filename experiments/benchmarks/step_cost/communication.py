"""What each placement of `jaxkd.distill` communicates in a step, by formula."""

from typing import Any, NamedTuple

import jax

from experiments.benchmarks.step_cost.collectives import Collective
from experiments.benchmarks.step_cost.compiled_parts import predict
from experiments.benchmarks.step_cost.pairs import Pair

MESH, MODEL_MESH, PMAP, VECTORIZED = PLACEMENTS = ("mesh", "mesh, model=2", "pmap", "vectorised")
# Bytes of a float32, and of an int32.
FLOAT = INDEX = 4


class Sizes(NamedTuple):
    """The sizes on which communication depends.

    Attributes:
        parameters: Parameters of the student.
        channels: Channels of all batch normalisations of the student.
        divided: Values of those weights and statistics of the teacher that two devices can share.
        example: Bytes of an example, its label included.
        arrays: Arrays of an example.
        classes: Number of logits.
    """

    parameters: int
    channels: int
    divided: int
    example: int
    arrays: int
    classes: int


def find_sizes(pair: Pair) -> Sizes:
    """Finds the sizes of a pair, without computing anything."""
    batch = pair.shapes(1)
    teacher, student = pair.models()
    key = jax.random.key(0)
    teacher_variables, variables = (
        jax.eval_shape(model.init, key, batch["inputs"]) for model in (teacher, student)
    )
    logits = jax.eval_shape(predict(student), variables, batch["inputs"])
    return Sizes(
        parameters=_count(variables["params"]),
        # A mean and a variance for each channel.
        channels=_count(variables["batch_stats"]) // 2,
        divided=sum(
            leaf.size
            for leaf in jax.tree.leaves(teacher_variables)
            if any(length % 2 == 0 for length in leaf.shape)
        ),
        example=sum(leaf.size * leaf.dtype.itemsize for leaf in batch.values()),
        arrays=len(batch),
        classes=logits.shape[-1],
    )


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def expect(placement: str, sizes: Sizes, *, devices: int, batch: int) -> dict[str, Collective]:
    """Returns what a placement communicates in a step, by its purpose.

    Args:
        placement: One of `PLACEMENTS`.
        sizes: The sizes of teacher and student.
        devices: Number of devices.
        batch: Number of examples in the batch of all devices.
    """
    if placement == VECTORIZED or devices == 1:
        return {}

    def reduce(count: int) -> Collective:
        return Collective("all-reduce", count * FLOAT, devices)

    def gather(count: int) -> Collective:
        return Collective("all-gather", count * FLOAT, devices)

    logits = batch * sizes.classes
    expected = {"gradients": reduce(sizes.parameters), "loss": reduce(1)}
    if placement == PMAP:
        return expected | {
            # Forward sums of values and squares; backward sums of two products.
            "batch norm": reduce(4 * sizes.channels),
            "indices": gather(batch),
            "logits": gather(logits)._replace(count=2),
            "gradient of the logits": Collective("reduce-scatter", logits * FLOAT, devices),
        }
    expected |= {
        # One of the backward sums is the gradient of the bias.
        "batch norm": reduce(3 * sizes.channels),
        # Each device adds the examples that it holds to a batch of zeros.
        "examples": Collective("all-reduce", batch * sizes.example, devices),
        "indices": Collective("all-gather", batch * INDEX, devices, sizes.arrays),
    }
    if placement == MODEL_MESH:
        expected["teacher"] = Collective("all-gather", sizes.divided * FLOAT, 2)
    return expected
