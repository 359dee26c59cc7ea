"""One of several processes that train plans together, on four devices in all.

`distributed_worker.py ADDRESS NUM_PROCESSES PROCESS_ID FOLDER FULL_STEP CASE...` prints for each
case the sum of the absolute values of each trained weight, and the accuracies. With a `FULL_STEP`
above 0, the disk of the primary process is full at that step of the last stage.
"""

import dataclasses
import errno
import json
import os
import sys
from pathlib import Path

# A doctest that imports this file has devices of its own.
if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // int(sys.argv[2])}"

import jax
import numpy as np

from jaxkd import data, distill
from jaxkd.runs import checkpoints
from small_plans import TRAIN, make_stage, soft_loss, train

# Few steps and evaluations: between processes, each takes tenths of a second.
OPTIONS = {"batch_norm": True, "batch_size": 15, "steps": 4}
STUDENT = {"teachers": ("teacher",), "loss": soft_loss, **OPTIONS}


def fill_disk(full_step):
    """Lets the primary process fail to save the last stage from a step on."""
    save = checkpoints.save

    def save_or_fail(folder, step, *args, **kwargs):
        if step >= full_step and folder.name == "last":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        save(folder, step, *args, **kwargs)

    checkpoints.save = save_or_fail


def make_teacher_and_student():
    return [make_stage("teacher", 8, **OPTIONS), make_stage("last", 8, **STUDENT)]


def make_plan():
    cached = make_stage("cached", 8, cache_teachers=True, **STUDENT)
    return [cached, *make_teacher_and_student()]


def train_on_mesh(folder, **options):
    placement = distill.MeshPlacement(distill.make_mesh())
    return train(folder, make_plan(), placement=placement, **options)


def train_on_model_axis(folder, **options):
    """Trains two stages of `train_on_mesh`, with their teacher divided over two devices."""
    placement = distill.MeshPlacement(distill.make_mesh(model=2))
    return train(folder, make_teacher_and_student(), placement=placement, **options)


def train_vectorized(folder, **options):
    """Trains three students at once; the number of devices does not divide theirs."""
    placement = distill.VectorizedPlacement(distill.make_mesh(), max_students=3)
    return train(folder, make_teacher_and_student(), range(3), placement=placement, **options)


def train_one_by_one(folder, **options):
    """Trains what `train_vectorized` trains, on one device."""
    return train(folder, make_teacher_and_student(), range(3), **options)


def train_grown(folder, **options):
    """Trains two stages of `train_on_mesh`, of which the last one was another training before."""
    options |= {"placement": distill.MeshPlacement(distill.make_mesh()), "grow": True}
    teacher, student = make_teacher_and_student()
    other = dataclasses.replace(student, loss=lambda *args: 2.0 * soft_loss(*args))
    train(folder, [teacher, other], config={"scale": 2}, **options)
    return train(folder, [teacher, student], config={"scale": 1}, **options)


def train_streamed(folder, **options):
    """Trains on records of which each process reads its share, and compares arrays in memory."""
    options |= {"placement": distill.MeshPlacement(distill.make_mesh())}
    reads = []

    def read(index):
        reads.append(index)
        return {name: array[index] for name, array in TRAIN.items()}

    records = data.Records(range(len(TRAIN["inputs"])), read)
    assert records.digest  # of the sample, which every process reads
    stages = [make_stage("last", 8, data=examples, **OPTIONS) for examples in (TRAIN, records)]
    # A multiple of the devices.
    stages = [dataclasses.replace(stage, batch_size=16) for stage in stages]
    expected, _ = train(folder / "arrays", stages[:1], **options)
    reads.clear()
    trained, run = train(folder / "records", stages[1:], **options)
    assert summarize(trained) == summarize(expected)
    # All else is read once more: one example for the shape of the network.
    assert len(reads) == 4 * 16 // jax.process_count() + 1, len(reads)
    return trained, run


def train_sequential(folder, **options):
    """Trains on records that every process reads in order, keeping its share."""
    options |= {"placement": distill.MeshPlacement(distill.make_mesh())}
    examples = [
        dict(zip(TRAIN, values, strict=True)) for values in zip(*TRAIN.values(), strict=True)
    ]
    records = data.SequentialRecords(examples, count=len(examples))
    stages = [
        dataclasses.replace(stage, data=records, batch_size=16)
        for stage in make_teacher_and_student()
    ]
    return train(folder, stages, **options)


CASES = {
    "streamed": train_streamed,
    "sequential": train_sequential,
    "grown": train_grown,
    "mesh": train_on_mesh,
    "model_axis": train_on_model_axis,
    "vectorized": train_vectorized,
    "one_by_one": train_one_by_one,
}


def summarize(trained):
    summary = {}
    for name, seeds in trained.items():
        for seed, model in enumerate(seeds):
            sums = [float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(model.variables)]
            summary[f"{name}, seed {seed}"] = [*sums, model.validation_accuracy]
    return summary


def main(address, num_processes, process_id, folder, full_step, *cases):
    if int(num_processes) > 1:
        distill.initialize_distributed(
            address, num_processes=int(num_processes), process_id=int(process_id)
        )
    assert jax.device_count() == 4
    options = {"save_every": 1e9, "evaluations": 2}
    if int(full_step):
        fill_disk(int(full_step))
        options["save_every"] = 0
    summaries = {}
    for case in cases:
        trained, _ = CASES[case](Path(folder) / case, **options)
        summaries[case] = summarize(trained)
    print(json.dumps(summaries))


if __name__ == "__main__":
    main(*sys.argv[1:])
