"""Gives odd and damaged inputs to the library's readers and command lines, by the thousand.

Weights, configurations, tables, images, folders of runs and command lines are made from a seed.
Each must be accepted or refused in one line of at most 300 characters. A fault is another
exception, no answer within 10 seconds, memory beyond four times the input and 300 MB, an executed
line of code, a changed file, a longer message, the message of another library, or the end of
the process.

Inputs that cause a fault are kept in a folder, with the command that repeats each. The exit status
is 1 if there are any. A command that was stopped goes on where it was, unless the code has changed.

Command: python -m experiments.benchmarks.fuzz --inputs 10000 --seed 0

Time: 15 minutes on 2 CPU cores
"""

import collections
import dataclasses
import hashlib
import json
import os
import queue
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from experiments import USER_XLA_FLAGS
from experiments.benchmarks.fuzzing import KINDS
from experiments.common import cli
from jaxkd.cli.limits import expand

MODULE = "experiments.benchmarks.fuzz"
WORKER = "experiments.benchmarks.fuzzing.worker"
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10.0
"""Seconds within which an input must be answered."""
START_SECONDS = 120.0
"""Seconds in which a worker must have imported the library and made its first input."""
INPUTS_PER_WORKER = 400
"""Number of inputs after which a process ends, and with it what it has kept in memory."""
NO_FAULTS = ("accepted", "refused")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the tool."""

    inputs: int = 10_000
    """Number of inputs, of all kinds in turn."""
    seed: int = 0
    """Seed of the inputs."""
    kinds: tuple[str, ...] = ()
    """Try only inputs of these kinds. By default all."""
    only: tuple[int, ...] = ()
    """Numbers of single inputs to try again, and to print the traceback of."""
    workers: int = 2
    """Number of processes."""
    workdir: str = "runs/fuzz"
    """Folder of the outcomes and of the inputs that cause a fault."""

    def check(self) -> None:
        """Raises `OptionError` for an invalid value."""
        cli.require(self.inputs >= 1, f"--inputs {self.inputs}: must be at least 1")
        cli.require(self.workers >= 1, f"--workers {self.workers}: must be at least 1")
        for kind in self.kinds:
            cli.require(kind in KINDS, f"--kinds {kind}: choose from {' '.join(KINDS)}")
        for index in self.only:
            cli.require(index >= 0, f"--only {index}: inputs are counted from 0")
        cli.require(
            sys.platform.startswith("linux"), "the limits of memory need Linux: use a container"
        )

    def select(self) -> list[int]:
        """Returns the numbers of the inputs to try."""
        kinds = self.kinds or KINDS
        indices = self.only or range(self.inputs)
        return [index for index in indices if KINDS[index % len(KINDS)] in kinds]


class Worker:
    """A process that tries inputs."""

    def __init__(self, seed: int, folder: Path) -> None:
        """Starts the process, with its inputs in a folder."""
        self._folder = folder
        # Programs are small, and compiling takes most of the time.
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": USER_XLA_FLAGS,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "COLUMNS": "100",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, str(seed), str(folder)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # `select` does not see a line that a buffer holds.
            bufsize=0,
            # A group of its own, so that Ctrl-C reaches only the process that ends the workers.
            start_new_session=True,
        )
        self.num_tried = 0

    def try_input(self, index: int) -> dict[str, Any]:
        """Returns the outcome of an input. Afterwards, a process that gave none has ended."""
        stdin, stdout = _pipes(self._process)
        self.num_tried += 1
        try:
            stdin.write(f"{index}\n".encode())
            stdin.flush()
        except BrokenPipeError:
            return self._end(index, "crash", "the process ended before the input")
        if not self._read_line(stdout, START_SECONDS):
            return self._end(index, "maker", "the input was not made: the tool itself has a fault")
        # The limit is that of the library: copying and comparing the input takes longer.
        line = self._read_line(stdout, SECONDS + 1)
        if line is None:
            return self._end(index, "hang", f"no answer in {SECONDS:.0f} s")
        if not line:
            return self._end(index, "crash", "the process ended")
        return json.loads(line)

    def _read_line(self, stdout: IO[bytes], seconds: float) -> bytes | None:
        """Returns the next line, empty if the process has ended, or `None` if none is in time."""
        ready, _, _ = select.select([stdout], [], [], seconds)
        return stdout.readline() if ready else None

    def _end(self, index: int, outcome: str, detail: str) -> dict[str, Any]:
        self.close()
        status = self._process.returncode
        return {"index": index, "outcome": outcome, "detail": f"{detail} (status {status})"}

    @property
    def is_alive(self) -> bool:
        """True while the process can try further inputs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the process, also from another thread that does not wait for it."""
        self._process.kill()

    def close(self) -> None:
        """Ends the process and waits for its end."""
        self.kill()
        self._process.wait()
        for pipe in _pipes(self._process):
            pipe.close()


def _pipes(process: subprocess.Popen) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def try_inputs(indices: Iterable[int], config: Config, folder: Path) -> Iterator[dict[str, Any]]:
    """Tries inputs in several processes and yields the outcome of each.

    Args:
        indices: Numbers of the inputs.
        config: The options.
        folder: Folder in which the inputs are made. An input without a fault is deleted.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in indices:
        waiting.put(index)
    outcomes: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    stop = threading.Event()
    workers: dict[int, Worker] = {}

    def work(number: int) -> None:
        scratch = folder / str(number)
        worker = None
        try:
            while not stop.is_set():
                index = waiting.get_nowait()
                if worker is None or not worker.is_alive or worker.num_tried >= INPUTS_PER_WORKER:
                    if worker is not None:
                        worker.close()
                    shutil.rmtree(scratch, ignore_errors=True)
                    scratch.mkdir(parents=True)
                    worker = workers[number] = Worker(config.seed, scratch)
                outcome = worker.try_input(index)
                if stop.is_set():
                    # The process was ended from outside, which is no outcome.
                    break
                _keep_or_delete(scratch / str(index), outcome, folder.parent / "faults")
                outcomes.put(outcome)
        except queue.Empty:
            pass
        finally:
            if worker is not None:
                worker.close()
            shutil.rmtree(scratch, ignore_errors=True)
            outcomes.put(None)

    threads = [threading.Thread(target=work, args=[i], daemon=True) for i in range(config.workers)]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            outcome = outcomes.get()
            if outcome is None:
                running -= 1
            else:
                yield outcome
    finally:
        stop.set()
        for worker in [*workers.values()]:
            worker.kill()
        for thread in threads:
            thread.join()


def _keep_or_delete(case: Path, outcome: dict[str, Any], faults: Path) -> None:
    """Moves the input of a fault to a folder that stays, with what happened."""
    if outcome["outcome"] in NO_FAULTS:
        shutil.rmtree(case, ignore_errors=True)
        return
    kept = faults / f"{kind_of(outcome['index'])}-{outcome['index']}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    if case.exists():
        # In one step, because a copy of a pipe or of an endless device would not end.
        case.rename(kept / "input")
    text = f"{outcome['outcome']}: {outcome['detail']}\n\n{outcome.get('traceback', '')}"
    (kept / "fault.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def kind_of(index: int) -> str:
    """Returns the kind of an input."""
    return KINDS[index % len(KINDS)]


def fingerprint_code() -> str:
    """Returns a digest of the library and of the tool, which decide the outcomes."""
    digest = hashlib.sha256()
    for folder in ("jaxkd", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read_outcomes(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the outcomes of an earlier command, or none if another seed or code made them."""
    if not path.is_file():
        return []
    # The last line was cut off if it has no line break.
    text = path.read_text(encoding="utf-8").rpartition("\n")[0]
    first, *outcomes = map(json.loads, text.splitlines() or ["{}"])
    if first != header:
        print("the code or the seed has changed: all inputs are tried again")
        return []
    return outcomes


def summarize(outcomes: Iterable[dict[str, Any]]) -> list[str]:
    """Returns a table of the outcomes by kind, line by line."""
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in KINDS}
    for outcome in outcomes:
        counts[kind_of(outcome["index"])][outcome["outcome"]] += 1
    lines = [f"{'kind':<16}{'accepted':>10}{'refused':>10}  faults"]
    for kind, counter in counts.items():
        faults = {name: count for name, count in counter.items() if name not in NO_FAULTS}
        listed = ", ".join(f"{count} {name}" for name, count in sorted(faults.items())) or "none"
        lines.append(f"{kind:<16}{counter['accepted']:>10}{counter['refused']:>10}  {listed}")
    return lines


def repeat_command(config: Config, index: int) -> str:
    """Returns the command that tries an input again."""
    return f"python -m {MODULE} --seed {config.seed} --only {index}"


def run_tests(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Tries the inputs that have no outcome yet, and returns the outcomes of all."""
    path = folder / "outcomes.jsonl"
    header = {"seed": config.seed, "code": fingerprint_code()}
    outcomes = read_outcomes(path, header)
    if not outcomes:
        shutil.rmtree(folder / "faults", ignore_errors=True)
    # Written again, because the last line may have been cut off.
    with open(path, "w", encoding="utf-8") as file:
        for line in (header, *outcomes):
            print(json.dumps(line), file=file)
        tried = {outcome["index"] for outcome in outcomes}
        remaining = [index for index in config.select() if index not in tried]
        for outcome in try_inputs(remaining, config, folder / "inputs"):
            print(json.dumps(outcome), file=file, flush=True)
            outcomes.append(outcome)
            if len(outcomes) % 500 == 0:
                print(f"{len(outcomes):,} inputs", flush=True)
    selected = {*config.select()}
    return [outcome for outcome in outcomes if outcome["index"] in selected]


def main(config: Config) -> None:
    """Tries the inputs, prints the outcomes and exits with status 1 if there are faults."""
    config.check()
    folder = expand(config.workdir).absolute()
    cli.check_writable("--workdir", folder)
    if config.only:
        outcomes = list(try_inputs(config.select(), config, folder / "inputs"))
        for outcome in outcomes:
            print(outcome.get("traceback", ""))
    else:
        outcomes = run_tests(config, folder)
    faults = sorted(
        (outcome for outcome in outcomes if outcome["outcome"] not in NO_FAULTS),
        key=lambda outcome: (kind_of(outcome["index"]), outcome["outcome"], outcome["index"]),
    )
    for fault in faults:
        detail = " ".join(fault["detail"].split())[:160]
        print(f"{kind_of(fault['index'])} {fault['index']}: {fault['outcome']}, {detail}")
        print(f"  {repeat_command(config, fault['index'])}")
    print(*summarize(outcomes), sep="\n")
    if faults:
        print(f"the inputs of {len(faults)} faults are in {folder / 'faults'}")
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
