"""One of several processes that train a plan together.

`distributed_worker.py ADDRESS NUM_PROCESSES PROCESS_ID FOLDER STOP_STEP` prints the sum of the
absolute values of each trained weight, and the accuracies. With a `STOP_STEP` above 0 it stops
after that step of the last stage.
"""

import json
import os
import sys

# A doctest that imports this file has devices of its own.
if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import numpy as np

from jaxkd import distill, runs
from small_plans import make_stage, soft_loss, train


class Stopped(Exception):
    pass


def stop_after(step):
    """Stops the last stage after a record of that step or a later one."""
    append_metrics = runs.Run.append_metrics

    def append_and_stop(run, record):
        append_metrics(run, record)
        if record["step"] >= step and record["stage"] == "cached":
            raise Stopped

    runs.Run.append_metrics = append_and_stop


def main(address, num_processes, process_id, folder, stop_step):
    if int(num_processes) > 1:
        distill.initialize_distributed(
            address, num_processes=int(num_processes), process_id=int(process_id)
        )
        assert jax.device_count() == 2 * jax.local_device_count() == 4
    # Few steps and evaluations: between processes, each takes tenths of a second.
    options = {"batch_norm": True, "batch_size": 15, "steps": 6}
    student = {"teachers": ("teacher",), "loss": soft_loss, **options}
    plan = [
        make_stage("teacher", 8, **options),
        make_stage("live", 8, **student),
        make_stage("cached", 8, cache_teachers=True, **student),
    ]
    placement = distill.MeshPlacement(distill.make_mesh())
    save_every = 1e9
    if int(stop_step):
        stop_after(int(stop_step))
        save_every = 0
    try:
        trained, _ = train(folder, plan, save_every=save_every, evaluations=3, placement=placement)
    except Stopped:
        print(json.dumps({}))
        return
    summary = {}
    for name, (model,) in trained.items():
        sums = [float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(model.variables)]
        summary[name] = [*sums, model.validation_accuracy]
    print(json.dumps(summary))


if __name__ == "__main__":
    main(*sys.argv[1:])
