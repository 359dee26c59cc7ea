"""Computes what a training step costs, and compares the formulas with the compiled programs.

For four pairs of teacher and student: the FLOPs and bytes of a step's parts, from the shapes of the
layers, beside XLA's own count. What each placement communicates, by formula and in the programs
that a step really runs, on virtual devices of a CPU and on several processes; strong scaling keeps
the batch, weak scaling the batch of a device. And what bounds a step on three machines, from the
peak rates of their datasheets. Nothing is timed.

Command: python -m experiments.benchmarks.cost --placed-only cnn lstm

Result: the FLOPs that XLA counts are up to 1.04 times those of the formulas, its bytes on a CPU up
to 5 times; mesh, pmap and vectorised students send what the formulas say (jax 0.12)

Time: minutes on 2 CPU cores, most of them for compiling; less than one with --tiny
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from experiments import USER_XLA_FLAGS
from experiments.benchmarks import timing
from experiments.benchmarks.step_cost import communication, compiled_parts, layers, tables
from experiments.benchmarks.step_cost.collectives import Collective, total
from experiments.benchmarks.step_cost.machines import MACHINES, Line, Machine, find_bounds
from experiments.benchmarks.step_cost.pairs import PAIRS, TINY_PAIRS, Pair
from experiments.common import cli
from jaxkd import runs
from jaxkd._files import write_atomically
from jaxkd._messages import list_some
from jaxkd.data.progress import track

ROOT = Path(__file__).parents[2]
WORKER = "experiments.benchmarks.step_cost.placed_step"
# Two batch sizes, through which the line of a machine's seconds goes.
SMALL, LARGE = 8, 16
BF16_BYTES = 2
SHARED_BY_PROCESSES = (communication.MESH, communication.PMAP)


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    only: tuple[str, ...] = ()
    """Pairs, such as cnn or lstm; all by default."""
    placed_only: tuple[str, ...] = ()
    """Pairs whose steps run under placements; all by default, which takes most of the time."""
    batch_size: int = 128
    """Images in the step that is divided into parts."""
    text_batch_size: int = 32
    """Texts in that step."""
    placed_batch_size: int = 32
    """Images or texts in the steps that run under placements, over all devices."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of virtual devices; each must divide the batches."""
    processes: tuple[int, ...] = (2, 4)
    """Numbers of processes of one device each, on this machine."""
    tiny: bool = False
    """Small networks, batches of 8, at most 2 devices and processes: seconds instead of minutes."""
    workdir: str = "runs/cost"
    """Folder of results.json and tables.md; those of an earlier run are replaced."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        names = cli.select_names(self.only, self.pairs)
        unknown = sorted({*self.placed_only} - {*names})
        cli.require(
            not unknown, f"--placed-only {list_some(unknown)}: choose from {' '.join(names)}"
        )
        cli.require(len(self.devices) > 0, "--devices: needs at least one number")
        for name in ("batch_size", "text_batch_size", "placed_batch_size"):
            size = getattr(self, name)
            cli.require(size >= 1, f"--{name.replace('_', '-')} {size}: must be at least 1")
        for name in ("devices", "processes"):
            for count in getattr(self, name):
                option = f"--{name} {count}"
                cli.require(count >= 1, f"{option}: must be at least 1")
                cli.require(
                    self.placed_batch_size % count == 0,
                    f"{option}: must divide --placed-batch-size {self.placed_batch_size}",
                )

    @property
    def pairs(self) -> dict[str, Pair]:
        """The pairs to choose from."""
        return TINY_PAIRS if self.tiny else PAIRS

    @property
    def effective(self) -> "Config":
        """The options, with those that `--tiny` replaces."""
        if not self.tiny:
            return self
        sizes = dict.fromkeys(("batch_size", "text_batch_size", "placed_batch_size"), 8)
        return dataclasses.replace(self, **sizes, devices=(1, 2), processes=(2,))


def count_parts(name: str, pair: Pair, batch_size: int) -> Iterator[dict]:
    """Yields a row for each part of a step, by formula and as XLA counts it."""
    compiled = compiled_parts.count_parts(pair, batch_size)
    for part, cost in _parts_on_paper(pair, batch_size).items():
        row = {"pair": name, "batch": batch_size, "part": part, "paper": cost[0]._asdict()}
        if part in compiled:
            row |= {"xla": compiled[part]._asdict(), "repeated": cost[1]}
        yield row


def _parts_on_paper(pair: Pair, batch_size: int) -> dict[str, tuple[layers.Cost, int]]:
    """Returns the cost of each part, and the FLOPs of it that XLA does not count."""
    teacher, student = pair.models()
    inputs = pair.shapes(batch_size)["inputs"]
    teacher_layers = layers.find_layers(teacher, inputs, train=False)
    student_layers = layers.find_layers(student, inputs, train=True)
    sizes = communication.find_sizes(pair)
    passes = layers.forward(student_layers), layers.backward(student_layers)
    return {
        "teacher": (layers.forward(teacher_layers), layers.repeated(teacher_layers)),
        # The loop of the backward pass has one of its two products; see `LSTM`.
        "student": (layers.add(*passes), 2 * layers.repeated(student_layers)),
        "loss": (layers.loss(batch_size, sizes.classes), 0),
        "optimizer": (layers.optimizer(sizes.parameters), 0),
        # A step reads its examples from the device's memory and writes its batch.
        "input": (layers.Cost(0, 2 * batch_size * sizes.example), 0),
    }


def list_steps(config: Config, pairs: Iterable[str], devices: int) -> list[dict]:
    """Lists the steps to take on a number of devices: strong scaling, then weak scaling.

    The largest number of devices has every placement, the others those that differ with it.
    """
    placements = [communication.MESH]
    if devices > 1:
        placements.append(communication.PMAP)
        if devices == max(config.devices):
            placements += [communication.MODEL_MESH] * (devices % 2 == 0)
            placements.append(communication.VECTORIZED)
    batch = config.placed_batch_size
    weak = batch // max(config.devices) * devices
    pairs = tuple(pairs)
    steps = [(pair, placement, batch) for pair in pairs for placement in placements]
    if weak != batch:
        steps += [(pair, placement, weak) for pair in pairs for placement in placements]
    keys = ("pair", "placement", "batch")
    return [dict(zip(keys, step, strict=True)) | {"tiny": config.tiny} for step in steps]


def measure_communication(config: Config, pairs: dict[str, Pair]) -> Iterator[dict]:
    """Yields a row for each step on several devices and on several processes."""
    sizes = {name: communication.find_sizes(pair) for name, pair in pairs.items()}
    groups = [(count, 1) for count in config.devices] + [(1, count) for count in config.processes]
    for devices, processes in track(groups, description="placements", total=len(groups)):
        count = devices * processes
        # One pair shows whether processes run the program of one process.
        steps = list_steps(config, pairs if processes == 1 else [next(iter(pairs))], count)
        if processes > 1:
            # Vectorised students train on the devices of one process.
            steps = [step for step in steps if step["placement"] in SHARED_BY_PROCESSES]
        for step, found in zip(steps, run_steps(steps, devices, processes), strict=True):
            yield _communication_row(sizes[step["pair"]], step, found, count, processes)


def _communication_row(
    sizes: communication.Sizes,
    step: dict,
    found: Sequence[Collective],
    devices: int,
    processes: int,
) -> dict:
    expected = communication.expect(step["placement"], sizes, devices=devices, batch=step["batch"])
    return {
        "pair": step["pair"],
        "placement": step["placement"],
        "devices": devices,
        "processes": processes,
        "batch": step["batch"],
        "compiled": total(found),
        "compiled_sent": sum(collective.sent for collective in found),
        "paper": {name: collective.sent for name, collective in expected.items()},
        "paper_sent": sum(collective.sent for collective in expected.values()),
    }


def run_steps(steps: list[dict], devices: int, processes: int) -> list[list[Collective]]:
    """Takes steps in new processes, and returns the collectives of each.

    Args:
        steps: As `experiments.benchmarks.step_cost.placed_step` takes them.
        devices: Number of virtual devices of each process.
        processes: Number of processes that train together.

    Raises:
        RunError: If a process fails.
    """
    address = f"127.0.0.1:{_find_free_port()}"
    workers = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for index in range(processes):
                folder = Path(scratch, str(index))
                folder.mkdir()
                process = (address, str(processes), str(index)) if processes > 1 else ()
                workers.append(_start(steps, folder, devices, process))
            outputs = [worker.communicate() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    for worker, (_, error) in zip(workers, outputs, strict=True):
        if worker.returncode:
            reason = (error.strip().splitlines() or ["no message"])[-1]
            raise runs.RunError(f"a step on {devices * processes} devices failed: {reason[:200]}")
    # The program is the same in all processes.
    results = json.loads(outputs[0][0].splitlines()[-1])
    return [[Collective(*collective) for collective in result] for result in results]


def _start(
    steps: list[dict], folder: Path, devices: int, process: tuple[str, ...]
) -> subprocess.Popen:
    flags = [flag for flag in USER_XLA_FLAGS.split() if "device_count" not in flag]
    flags += [f"--xla_force_host_platform_device_count={devices}"]
    flags += [f"--xla_dump_to={folder}", "--xla_dump_hlo_as_text"]
    python_path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": os.pathsep.join(python_path),
        # A program from the cache would not be written to the folder.
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        # Leaves out optimizations of the machine code, after those of the program.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", WORKER, json.dumps(steps), str(folder), *process],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _find_free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def find_machine_bounds(name: str, pair: Pair) -> Iterator[dict]:
    """Yields a row for each machine: what bounds a step of a pair, divided over the chips."""
    sizes = communication.find_sizes(pair)
    costs = {batch: _cost_of_chip(pair, batch, sizes) for batch in (SMALL, LARGE)}
    for machine in MACHINES:
        lines = _make_lines(machine, costs, sizes)
        where = {
            "mesh": ("compute", "memory", "links"),
            "pmap": ("compute", "memory", "links of pmap"),
            "streamed": ("compute", "memory", "links of pmap", "input"),
        }
        bounds = {
            key: find_bounds({resource: lines[resource] for resource in resources})
            for key, resources in where.items()
        }
        yield {
            "machine": machine.title,
            "pair": name,
            "lines": {resource: line._asdict() for resource, line in lines.items()},
            # In examples of all chips together.
            "bounds": {
                key: [[machine.chips * batch, resource.split()[0]] for batch, resource in found]
                for key, found in bounds.items()
            },
        }


def _make_lines(
    machine: Machine, costs: dict[int, layers.Cost], sizes: communication.Sizes
) -> dict[str, Line]:
    """Makes the seconds of each resource, as functions of the examples of one chip."""

    def seconds_of_links(placement: str, batch: int) -> float:
        sent = communication.expect(
            placement, sizes, devices=machine.chips, batch=batch * machine.chips
        )
        return sum(part.sent for part in sent.values()) / machine.links

    points: dict[str, list[tuple[float, float]]] = {}
    for batch, cost in costs.items():
        seconds = {
            "compute": cost.flops / machine.flops,
            "memory": cost.bytes / machine.memory,
            "links": seconds_of_links(communication.MESH, batch),
            "links of pmap": seconds_of_links(communication.PMAP, batch),
            "input": batch * sizes.example / machine.host,
        }
        for resource, value in seconds.items():
            points.setdefault(resource, []).append((batch, value))
    return {resource: Line.through(*pair) for resource, pair in points.items()}


def _cost_of_chip(pair: Pair, batch: int, sizes: communication.Sizes) -> layers.Cost:
    """Sums a step in bfloat16, with weights, their gradients and the optimizer in float32."""
    teacher, student = pair.models()
    inputs = pair.shapes(batch)["inputs"]
    teacher_layers = layers.find_layers(teacher, inputs, train=False)
    student_layers = layers.find_layers(student, inputs, train=True)
    cost = layers.add(
        layers.forward(teacher_layers, item_bytes=BF16_BYTES),
        layers.forward(student_layers, item_bytes=BF16_BYTES),
        layers.backward(student_layers, item_bytes=BF16_BYTES),
    )
    moved = layers.optimizer(sizes.parameters).bytes + 2 * batch * sizes.example
    return layers.Cost(cost.flops, cost.bytes + moved)


def main(config: Config) -> None:
    """Computes and compares everything, writes the results and prints the tables."""
    config = config.effective
    folder = timing.prepare_folder(config)
    pairs = {name: config.pairs[name] for name in cli.select_names(config.only, config.pairs)}
    batch_sizes = {
        name: config.text_batch_size if pair.on_texts else config.batch_size
        for name, pair in pairs.items()
    }
    parts = [
        row
        for name, pair in track(pairs.items(), description="parts of a step", total=len(pairs))
        for row in count_parts(name, pair, batch_sizes[name])
    ]
    placed = {name: pairs[name] for name in config.placed_only or pairs}
    results = {
        "parts": parts,
        "bounds": [row for name, pair in pairs.items() for row in find_machine_bounds(name, pair)],
        "communication": list(measure_communication(config, placed)),
    }
    timing.write_results(folder, config, runs.describe_environment(), results)
    text = "\n\n".join(tables.make_tables(results).values()) + "\n"
    write_atomically(folder / "tables.md", text.encode())
    print(text, f"Everything is in {folder}", sep="\n")


if __name__ == "__main__":
    cli.run(main, Config, __doc__, resumes=False)
