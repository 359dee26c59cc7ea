"""The command line: chooses measurements, runs them one by one, and says what is left."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.benchmarks import accelerator
from experiments.benchmarks.accelerator import process, results
from experiments.benchmarks.accelerator.device import Device, find_device
from experiments.benchmarks.accelerator.measurement import Context, Measurement
from experiments.benchmarks.accelerator.process import ProcessError
from experiments.benchmarks.accelerator.queue import QUEUE
from experiments.common.checks import OptionError, check_writable, require, select_names
from jaxkd._files import write_atomically
from jaxkd._messages import shorten
from jaxkd.cli import errors
from jaxkd.cli.limits import expand

COMMAND = "python -m experiments.benchmarks.accelerator"
PROBE_SECONDS = 120.0
"""Limit of the process that asks JAX for the device."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description=accelerator.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=25.0,
        help="budget of this call; a measurement that is expected to take more than the rest of it "
        "is passed over (default: %(default)g)",
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="measure only these; see --list"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure again what this device has already"
    )
    parser.add_argument("--list", action="store_true", help="print the queue and measure nothing")
    parser.add_argument(
        "--tiny", action="store_true", help="measure at toy sizes, to try the kit on a CPU"
    )
    parser.add_argument(
        "--pack", help="folder that `python -m experiments.benchmarks.accelerator.pack` made"
    )
    parser.add_argument(
        "--workdir",
        default="runs/accelerator",
        help="folder of results, logs and what is kept between calls (default: %(default)s)",
    )
    parser.add_argument(
        "--copy-to", metavar="FOLDER", help="another folder for the results, each as it ends"
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Runs the command. Expected errors end in one line, failed measurements in status 1."""
    errors.check_arguments(sys.argv[1:])
    options = parse_arguments()
    try:
        with errors.errors_in_one_line(OptionError, ProcessError):
            _check(options)
            names = select_names(options.only, (measurement.name for measurement in QUEUE))
            selected = [measurement for measurement in QUEUE if measurement.name in names]
            if options.tiny:
                selected = [measurement.for_tiny() for measurement in selected]
            if options.list:
                print_queue(selected)
                return
            failed = Session.start(options).run(selected)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    if failed:
        sys.exit(1)


def _check(options: argparse.Namespace) -> None:
    require(
        0 < options.minutes <= 24 * 60,
        f"--minutes {shorten(options.minutes, 40)}: must be above 0 and at most {24 * 60}",
    )
    for name in ("workdir", "pack", "copy_to"):
        require(
            getattr(options, name) != "",
            f"--{name.replace('_', '-')} is empty: give a folder, or leave it out",
        )
    if options.pack is not None:
        folder = expand(options.pack)
        require(
            folder.is_dir(),
            f"--pack {options.pack}: no such folder; make it with {COMMAND}.pack",
        )


def print_queue(measurements: Sequence[Measurement]) -> None:
    """Prints names and estimates."""
    width = max(len(measurement.name) for measurement in measurements)
    for measurement in measurements:
        notes = " (needs --pack)" if measurement.needs_pack else ""
        first_line = sys.modules[measurement.measure.__module__].__doc__ or ""
        print(
            f"{measurement.name:<{width}}  about {measurement.minutes:4.1f} min  "
            f"{first_line.splitlines()[0]}{notes}"
        )
    total = sum(measurement.minutes for measurement in measurements)
    print(f"{len(measurements)} measurements, expected to take {total:.0f} min on an H100")


class Session(NamedTuple):
    """One call of the command.

    Attributes:
        workdir: Folder of everything.
        device: The device that is measured.
        source: Digits of the source of jaxkd.
        deadline: When the budget ends, by the monotonic clock.
        options: The command's options.
    """

    workdir: Path
    device: Device
    source: str
    deadline: float
    options: argparse.Namespace

    @classmethod
    def start(cls, options: argparse.Namespace) -> "Session":
        """Asks for the device, in a process that leaves its memory to the others."""
        deadline = time.monotonic() + 60 * options.minutes
        print(f"{COMMAND}: takes at most {options.minutes:g} minutes", flush=True)
        workdir = expand(options.workdir).absolute()
        check_writable("--workdir", workdir)
        if options.copy_to:
            check_writable("--copy-to", expand(options.copy_to))
        _set_environment(workdir)
        device = process.call_apart(find_device, log=workdir / "device.log", limit=PROBE_SECONDS)
        count = "" if device.count == 1 else f"{device.count} × "
        print(f"{count}{device.kind}, results in {workdir}", flush=True)
        return cls(workdir, device, results.source_version(), deadline, options)

    @property
    def folder(self) -> Path:
        """The folder of the device's results. Toy sizes have one of their own."""
        return self.workdir / (self.device.folder_name + ("_tiny" if self.options.tiny else ""))

    def run(self, measurements: Sequence[Measurement]) -> list[str]:
        """Runs measurements in order and returns the names of those that failed."""
        self.folder.mkdir(exist_ok=True)
        failed, left = [], []
        for measurement in measurements:
            reason = self._find_reason_to_pass_over(measurement)
            if reason is None:
                if self._measure(measurement):
                    continue
                # Cut off by the budget, not by its own fault.
                is_cut_off = time.monotonic() >= self.deadline
                (left if is_cut_off else failed).append(measurement.name)
            elif reason:
                left.append(measurement.name)
                print(f"{measurement.name}: passed over, {reason}", flush=True)
        if left:
            print(f"left: {' '.join(left)}; the same command goes on")
        if failed:
            print(f"failed: {' '.join(failed)}; see {self.folder}/NAME.error.txt", file=sys.stderr)
        return failed

    def _find_reason_to_pass_over(self, measurement: Measurement) -> str | None:
        """Returns why not to measure now, `""` if it is done already, `None` to measure."""
        finished = results.find_finished(
            self._path(measurement), results.identify(measurement, self.source)
        )
        if finished is not None and not self.options.again:
            print(f"{measurement.name}: already measured: {finished['summary']}", flush=True)
            self._copy(self._path(measurement))
            return ""
        if measurement.needs_pack and self.options.pack is None:
            return "needs --pack"
        minutes = (self.deadline - time.monotonic()) / 60
        if measurement.minutes > minutes:
            return (
                f"takes about {measurement.minutes:.1f} min, and {max(0, minutes):.1f} min are left"
            )
        return None

    def _measure(self, measurement: Measurement) -> bool:
        """Runs a measurement and prints its line. Returns whether it succeeded."""
        identity = results.identify(measurement, self.source)
        context = self._make_context(measurement, results.digest_identity(identity))
        error_path = self.folder / f"{measurement.name}.error.txt"
        start = time.monotonic()
        try:
            process.call_apart(
                results.measure_and_save,
                *(measurement, context, identity, self.options.tiny),
                log=context.log,
                limit=min(measurement.limit, self.deadline - start),
            )
        except ProcessError as error:
            print(f"{measurement.name}: failed: {error}", flush=True)
            write_atomically(error_path, f"{error}\n\n{error.details}".encode())
            self._copy(error_path)
            return False
        error_path.unlink(missing_ok=True)
        # What would let the measurement go on.
        shutil.rmtree(context.scratch, ignore_errors=True)
        content = results.read(self._path(measurement)) or {}
        seconds = time.monotonic() - start
        print(f"{measurement.name}: {content.get('summary')} ({seconds:.0f} s)", flush=True)
        self._copy(self._path(measurement))
        return True

    def _make_context(self, measurement: Measurement, digest: str) -> Context:
        shared = self.workdir / "scratch" / f"{self.folder.name}_{self.source}"
        scratch = shared / f"{measurement.name}_{digest}"
        if self.options.again:
            shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{measurement.name}.log"
        log.write_bytes(b"")
        pack = self.options.pack
        return Context(
            self.folder, scratch, shared, pack and expand(pack).absolute(), log.absolute()
        )

    def _path(self, measurement: Measurement) -> Path:
        return self.folder / f"{measurement.name}.json"

    def _copy(self, path: Path) -> None:
        """Copies a file to the other folder for results, if there is one."""
        if self.options.copy_to:
            folder = expand(self.options.copy_to) / self.folder.name
            folder.mkdir(exist_ok=True)
            write_atomically(folder / path.name, path.read_bytes())


def _set_environment(workdir: Path) -> None:
    """Sets what all processes inherit."""
    # Two libraries share the device, and several processes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
