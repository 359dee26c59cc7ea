"""What experiments that run plans share: options, stages, the losses of labels and soft targets, what is left."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.cli import require
from jaxkd import distill, export, losses, models, parallel, report, runs
from jaxkd.models import Outputs
from jaxkd.plan import Examples
from jaxkd.train import Batch, Loss
from jaxkd.transfer import Rule, transfer

AT_ONCE = 64
"""The most students that train at once unless the user asks for more."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an experiment that runs a plan."""

    seeds: int = 3
    """How many times everything is trained."""
    seed: int = 0
    """The first seed; the others count up from it."""
    epochs: int = 10
    """Passes over what there is to learn from, for each network."""
    batch_size: int = 128
    """Examples a step."""
    learning_rate: float = 1e-3
    """Adam's, at the start; it falls to 0 along a cosine."""
    teacher_cache: str | None = None
    """Folder in which the answers of teachers are kept for other runs as well; if not named, in the run's directory."""
    deterministic: bool = False
    """Have a GPU compute the same bits at every run, more slowly; a CPU does so anyway, a TPU has no such switch."""
    bf16: bool = False
    """Compute in bfloat16, with float32 weights and losses: faster on GPUs and TPUs."""
    parallel: Literal["jit", "pmap", "none"] = "jit"
    """How a step runs on several devices: with jit as one program over all of them, with pmap likewise, with none on
    the first device alone."""
    model_devices: int = 1
    """Devices over which each teacher's weights are divided, where it does not fit on one; with jit."""
    at_once: int = 0
    """Students that train at once as one program: seeds, and stages that differ in numbers alone. 0 is one on a CPU,
    which convolves many networks slowly, and elsewhere all of them if there is one for each device."""
    coordinator: str = ""
    """On several hosts, each of which runs the same command: address:port of the first, or auto where JAX finds out."""
    num_hosts: int | None = None
    """How many hosts there are, unless auto."""
    host: int | None = None
    """Which of them this is, from 0, unless auto."""
    evaluations: int = 10
    """How often each network meets the validation split in training, evenly spread."""
    save_every: float = 15.0
    """Seconds between checkpoints; at the end of a stage and on Ctrl-C there is one in any case."""
    workdir: str | None = None
    """The run's directory; if not named, one below runs/ after the options. The same command again resumes there."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        require(self.seeds >= 1, f"--seeds {self.seeds}: at least one seed is needed")
        require(0 <= self.seed < 2**31, f"--seed {self.seed}: choose one from 0 to {2**31 - 1}")
        require(self.epochs >= 1, f"--epochs {self.epochs}: train for at least one")
        require(self.batch_size >= 1, f"--batch-size {self.batch_size}: at least one example a step is needed")
        require(
            self.learning_rate > 0 and math.isfinite(self.learning_rate),
            f"--learning-rate {self.learning_rate}: must be above 0",
        )
        require(self.evaluations >= 1, f"--evaluations {self.evaluations}: at least one, at the end")
        require(self.save_every >= 0, f"--save-every {self.save_every}: at least 0 seconds")
        require(
            self.model_devices >= 1 and jax.device_count() % self.model_devices == 0,
            f"--model-devices {self.model_devices}: must divide the {jax.device_count()} devices",
        )
        require(
            self.parallel == "jit" or self.model_devices == 1,
            f"--model-devices {self.model_devices}: weights are divided by --parallel jit alone",
        )
        require(self.at_once >= 0, f"--at-once {self.at_once}: one student or more, or 0 for what suits the device")
        require(
            self.at_once <= 1 or (self.parallel != "pmap" and self.model_devices == 1 and not self.coordinator),
            f"--at-once {self.at_once}: students that train at once are divided over one host's devices as jit does it",
        )
        require(
            self.parallel != "pmap" or self.batch_size % jax.device_count() == 0,
            f"--batch-size {self.batch_size}: pmap needs a multiple of the {jax.device_count()} devices; jit does not",
        )


@dataclasses.dataclass(frozen=True)
class SoftOptions(Options):
    """Options of an experiment in which soft targets teach."""

    temperature: float = 4.0
    """Softens the targets; above 0."""
    alpha: float = 0.9
    """Weight of the soft targets, from 0 to 1; the labels have the rest."""

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        super().check()
        require(
            self.temperature > 0 and math.isfinite(self.temperature),
            f"--temperature {self.temperature}: must be above 0, which leaves the logits as they are at 1",
        )
        require(0 <= self.alpha <= 1, f"--alpha {self.alpha}: the weight of the soft targets lies from 0 to 1")


def devices(options: Options, *, alike: int = 1) -> parallel.Sharded | parallel.Mapped | parallel.Population:
    """The devices that the options name, and how many students train on them at once.

    Args:
        options: The options.
        alike: How many stages differ in numbers alone.
    """
    if options.parallel == "pmap":
        return parallel.Mapped()
    alone = jax.local_devices()[:1] if options.parallel == "none" else None
    mesh = parallel.make_mesh(model=options.model_devices, devices=alone)
    at_once = options.at_once or _suitable(options, mesh, options.seeds * alike)
    return parallel.Population(mesh, at_once) if at_once > 1 else parallel.Sharded(mesh)


def _suitable(options: Options, mesh: Any, students: int) -> int:
    """How many students to train at once where the user leaves it open."""
    divided = options.model_devices > 1 or jax.process_count() > 1
    if divided or mesh.devices.flat[0].platform == "cpu" or students < mesh.size:
        return 1
    return min(students, AT_ONCE)


def steps(options: Options, examples: int, *, epochs: int | None = None) -> int:
    """How many steps the options' epochs take, or `epochs` of them, over so many examples."""
    return math.ceil((options.epochs if epochs is None else epochs) * examples / options.batch_size)


def stage(
    name: str, model: models.Model, examples: Examples, loss: Loss, options: Options, *, steps: int, **more: Any
) -> distill.Stage:
    """A stage with the options' optimizer and batch size."""
    tx = optax.adam(optax.cosine_decay_schedule(options.learning_rate, steps))
    given: dict[str, Any] = {"tx": tx, "batch_size": options.batch_size} | more
    return distill.Stage(name, model, examples, loss, steps=steps, **given)


def model(module: Any, options: Options) -> models.Model:
    """A Flax module as a model, in the precision that the options name."""
    made = models.from_linen(module)
    return models.computing_in(made, jnp.bfloat16) if options.bf16 else made


def with_new_head(source: dict, fresh: dict) -> dict:
    """The weights of another network but for the last layer, which is that of a fresh network."""
    rules = (Rule("params/logits/{rest...}", None),)
    return transfer(source, fresh, rules=rules, strict=False)[0]


def supervised(student: Outputs, teachers: tuple[Outputs, ...], batch: Batch) -> Any:
    """The loss of a network that learns from labels alone."""
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def taught(options: SoftOptions) -> Loss:
    """The loss of a network that learns from one teacher's soft targets, and from labels where there are any.

    Where the batch has `labelled`, an example without a label gives all weight to the soft targets.
    """

    def loss(student: Outputs, teachers: tuple[Outputs, ...], batch: Batch) -> Any:
        (teacher,) = teachers
        alpha = jnp.where(batch["labelled"], options.alpha, 1.0) if "labelled" in batch else options.alpha
        return losses.distillation_loss(
            student.logits, teacher.logits, batch["labels"], temperature=options.temperature, alpha=alpha
        )

    return loss


def workdir(experiment: str, options: Options, name: str) -> Path:
    """The directory that the options name, or one below runs/ that is named after what is learnt from and them."""
    if options.workdir:
        return Path(options.workdir).expanduser()
    named = {name: value for name, value in dataclasses.asdict(options).items() if name not in runs.INCIDENTAL}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / experiment / f"{Path(name).name}-{digest}"


def open_run(experiment: str, options: Options, name: str, arrays: Iterable[np.ndarray]) -> runs.Run:
    """Opens the run of an experiment, or goes on with it.

    Args:
        experiment: Name of the script.
        options: Its options.
        name: What is learnt from.
        arrays: All of it, for the fingerprint.
    """
    config = {"experiment": experiment} | dataclasses.asdict(options)
    return runs.open_run(workdir(experiment, options, name), config, arrays=arrays)


def train(
    run: runs.Run,
    options: Options,
    plan: Sequence[distill.Stage | distill.Pretrained],
    *,
    validation: Mapping[str, Any],
    alike: int = 1,
    seeds: Sequence[int] | None = None,
    **more: Any,
) -> dict[str, list[distill.Trained]]:
    """Runs a plan for the options' seeds, where and as the options say.

    Args:
        run: From `open_run`.
        options: The options.
        plan: The stages and pretrained models.
        validation: `inputs` and `labels`.
        alike: How many stages differ in numbers alone, and so may train at once.
        seeds: Others than the options'.
        **more: Further arguments of `distill.run_plan`.
    """
    return distill.run_plan(
        plan,
        range(options.seed, options.seed + options.seeds) if seeds is None else seeds,
        run,
        validation=validation,
        save_every=options.save_every,
        evaluations=options.evaluations,
        devices=devices(options, alike=alike),
        teacher_cache=options.teacher_cache,
        **more,
    )


def best(trained: Mapping[str, Sequence[distill.Trained]], students: Sequence[str]) -> tuple[str, int]:
    """Of these stages the one of the highest mean validation accuracy, and the number of its best seed."""
    name = max(students, key=lambda name: sum(one.validation_accuracy for one in trained[name]))
    return name, int(np.argmax([one.validation_accuracy for one in trained[name]]))


def with_spread(values: Any) -> str:
    """The mean and, of several seeds, the standard deviation."""
    values = np.asarray(values, float)
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


class Done(NamedTuple):
    """What a run left.

    Attributes:
        folder: Its directory.
        rows: The table's.
        trained: For each stage, what it left, an entry a seed.
    """

    folder: Path
    rows: list[dict]
    trained: Mapping[str, Sequence[distill.Trained]]


def leave(
    run: runs.Run,
    plan: Sequence[distill.Stage | distill.Pretrained],
    trained: Mapping[str, Sequence[distill.Trained]],
    test: Mapping[str, Any],
    *,
    title: str,
    students: Sequence[str],
    comparisons: Sequence[tuple[str, str]],
    reference: str = "teacher",
    unlisted: Sequence[str] = (),
    remarks: Callable[[Sequence[dict], Path], Sequence[str]] | None = None,
    **measured: Any,
) -> Done:
    """Leaves results, report, figures and the best student of a plan of classifiers.

    Args:
        run: From `open_run`.
        plan: The stages and pretrained models.
        trained: From `train`.
        test: `inputs` and `labels`.
        title: The report's.
        students: Stages of which the best is exported: the highest mean validation accuracy, then the best seed.
        comparisons: Pairs of stages that the report compares.
        reference: The one with which agreement is measured.
        unlisted: Those that the tables leave out.
        remarks: `(rows, folder) -> paragraphs` in Markdown for the report, whose figures it draws into the folder.
        **measured: Further arguments of `distill.results`.

    Returns:
        What is left.
    """
    folder = run.folder
    rows = distill.results(
        [one for one in plan if one.name not in unlisted], trained, test, reference=reference, **measured
    )
    if not parallel.is_first_host():
        return Done(folder, rows, trained)
    run.write_results(rows)
    report.write_report(
        folder,
        title=title,
        rows=rows,
        metrics=run.metrics(),
        comparisons=comparisons,
        settings=run.config,
        environment=run.environment,
        remarks=remarks(rows, folder) if remarks else (),
    )
    name, seed = best(trained, students)
    variables = trained[name][seed].variables
    student = next(one.model for one in plan if one.name == name)
    export.save_safetensors(folder / "student.safetensors", variables)
    export.save_program(folder / "student.jaxexport", student, variables, test["inputs"][0])
    report.print_table(rows)
    for one, baseline in comparisons:
        print(report.compare(rows, one, baseline))
    print(f"The best student by validation, {name}, is exported. Everything is in {folder}: begin with report.md")
    return Done(folder, rows, trained)
