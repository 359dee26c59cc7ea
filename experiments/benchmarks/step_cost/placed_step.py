"""Takes one step under each placement, and prints the collectives of the programs that it ran.

`experiments.benchmarks.cost` starts this module in processes of its own, because XLA reads the
number of virtual devices and the folder for its programs when it starts:

    python -m experiments.benchmarks.step_cost.placed_step STEPS FOLDER [ADDRESS PROCESSES INDEX]

STEPS is a JSON list of `{"pair": ..., "placement": ..., "batch": ..., "tiny": ...}`, and FOLDER
that of `--xla_dump_to`. The last line printed is a JSON list of the collectives of each step.
"""

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.step_cost.collectives import Collective, find_collectives
from experiments.benchmarks.step_cost.communication import MODEL_MESH, PMAP, VECTORIZED
from experiments.benchmarks.step_cost.pairs import (
    PAIRS,
    TINY_PAIRS,
    Pair,
    distillation_loss,
    make_optimizer,
)
from jaxkd import distill

EXAMPLES_PER_BATCH = 4
"""Number of batches in the data set."""


def make_placement(name: str) -> distill.Placement:
    """Makes a placement on all devices. A vectorised one trains a student on each."""
    if name == PMAP:
        return distill.PmapPlacement()
    mesh = distill.make_mesh(model=2 if name == MODEL_MESH else 1)
    if name == VECTORIZED:
        return distill.VectorizedPlacement(mesh, mesh.size)
    return distill.MeshPlacement(mesh)


def make_step(pair: Pair, placement: distill.Placement, batch_size: int) -> Callable[[], Any]:
    """Puts everything onto the devices, as a plan does, and makes a function that takes a step."""
    teacher, student = pair.models()
    tx = make_optimizer()
    # More examples than a batch, as in any training.
    data = pair.batch(EXAMPLES_PER_BATCH * batch_size)
    students = placement.max_students
    teacher_variables, variables = (
        zeros_of(jax.eval_shape(model.init, jax.random.key(0), data["inputs"][:1]))
        for model in (teacher, student)
    )
    states = placement.put_states([distill.init_train_state(variables, tx)] * students)
    # The students share the arrays, which placements recognise by their identity.
    arrays = {name: placement.put_array(array) for name, array in data.items()}
    examples = placement.put_examples([(arrays, distill.BatchInfo())] * students)
    teachers = placement.put_teachers([(teacher_variables,)] * students)
    keys = placement.put_keys([jax.random.key(i) for i in range(students)])
    step = placement.make_multi_step(
        functools.partial(
            distill.make_train_step, student, tx, distillation_loss, teachers=[teacher]
        )
    )
    indices = np.broadcast_to(np.arange(batch_size), (1, students, batch_size))
    return lambda: step(states, examples, indices, teachers, keys)


def zeros_of(shapes: Any) -> Any:
    """Makes arrays of 0. What is communicated does not depend on the values."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def run_and_find(step: Callable[[], Any], folder: Path) -> list[Collective]:
    """Takes a step, and finds the collectives in all programs that XLA compiled meanwhile."""
    _delete_programs(folder)
    jax.block_until_ready(step())
    found = []
    for path in sorted(folder.glob("*after_optimizations.txt")):
        found += find_collectives(path.read_text(encoding="utf-8"))
    _delete_programs(folder)
    return found


def _delete_programs(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def main(steps: str, folder: str, *process: str) -> None:
    """Takes the steps and prints their collectives."""
    if process:
        address, num_processes, index = process
        distill.initialize_distributed(
            address, num_processes=int(num_processes), process_id=int(index)
        )
    results = []
    for step in json.loads(steps):
        pair = (TINY_PAIRS if step["tiny"] else PAIRS)[step["pair"]]
        placement = make_placement(step["placement"])
        results.append(run_and_find(make_step(pair, placement, step["batch"]), Path(folder)))
        jax.clear_caches()
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
