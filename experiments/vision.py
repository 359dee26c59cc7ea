"""What the image experiments share: options, stages of one length, and what is left behind."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.cli import OptionError, require
from jaxkd import checkpoints, data, distill, export, losses, models, parallel, report, runs
from jaxkd.models import Outputs
from jaxkd.plan import Examples
from jaxkd.train import Batch, Loss
from jaxkd.transfer import Rule, transfer

OfSeed = Callable[[int], dict[str, Any]]
"""What a seed learns from."""
AT_ONCE = 64
"""The most students that train at once unless the user asks for more."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an image experiment."""

    dataset: str = "fashion_mnist_mini"
    """`fashion_mnist_mini`, which comes along; a TFDS name such as `cifar10`; or a folder with train/CLASS/ and
    test/CLASS/."""
    data_dir: str | None = None
    """Where TFDS data sets lie, if not where TFDS puts them."""
    image_size: int = 64
    """Side in pixels to which a folder's images are fitted."""
    seeds: int = 3
    """How many times everything is trained."""
    seed: int = 0
    """The first seed; the others count up from it."""
    epochs: int = 10
    """Passes over the training images, for each network."""
    batch_size: int = 128
    """Images a step."""
    learning_rate: float = 1e-3
    """Adam's, at the start; it falls to 0 along a cosine."""
    augment: bool = False
    """Crop and flip the images at random."""
    views: int | None = None
    """With --augment: how many pictures of each image there are, which the epochs show in turn, so that a teacher sees
    each once alone; None: a new one at every step."""
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
    save_every: float = 15.0
    """Seconds between checkpoints; at the end of a stage and on Ctrl-C there is one in any case."""
    workdir: str | None = None
    """The run's directory; if not named, one below runs/ after the options. The same command again resumes there."""

    @property
    def caches_teachers(self) -> bool:
        """Whether all that a student is shown is known before, so that its teachers can answer once."""
        return not self.augment or self.views is not None

    def check(self) -> None:
        """Raises `OptionError` for a value that makes no sense."""
        require(self.seeds >= 1, f"--seeds {self.seeds}: at least one seed is needed")
        require(0 <= self.seed < 2**31, f"--seed {self.seed}: choose one from 0 to {2**31 - 1}")
        require(self.epochs >= 1, f"--epochs {self.epochs}: train for at least one")
        require(self.batch_size >= 1, f"--batch-size {self.batch_size}: at least one image a step is needed")
        require(
            self.learning_rate > 0 and math.isfinite(self.learning_rate),
            f"--learning-rate {self.learning_rate}: must be above 0",
        )
        require(
            self.views is None or (self.augment and self.views >= 1),
            f"--views {self.views}: at least one, and of images that --augment crops and flips",
        )
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
    """Options of an image experiment in which soft targets teach."""

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


def network(module: Any, mean: Any, std: Any, options: Options) -> models.Model:
    """A Flax module for uint8 images, which are standardised, in the precision that the options name.

    Args:
        module: One of `jaxkd.models`.
        mean: Of each channel, in units of full brightness.
        std: Standard deviation, likewise.
        options: The options.
    """
    model = models.from_linen(module)
    model = models.computing_in(model, jnp.bfloat16) if options.bf16 else model
    return models.standardized(model, np.asarray(mean), np.asarray(std))


def cnn(features: Sequence[int], hidden: int, dataset: data.Dataset, options: Options) -> models.Model:
    """A CNN for a data set's uint8 images, standardised by the training images' mean and deviation.

    Raises:
        OptionError: If the images are too small for it.
    """
    module = models.CNN(tuple(features), hidden, len(dataset.class_names))
    model = network(module, *data.channel_statistics(dataset.train.images), options)
    try:
        jax.eval_shape(model.init, jax.random.key(0), dataset.train.images[:1])
    except ValueError as error:
        raise OptionError(f"the images do not fit the network: {str(error).splitlines()[0]}") from error
    return model


def pretrained(
    name: str,
    module: Any,
    weights: str | Path,
    images: Any,
    options: Options,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> distill.Pretrained:
    """A network with the weights of a PyTorch or safetensors file, for uint8 images.

    Args:
        name: Its name in the plan.
        module: One of `jaxkd.models` that knows PyTorch's names.
        weights: The file.
        images: Some of the images.
        options: The options.
        mean: Of each channel, by which its images are standardised, in units of full brightness.
        std: Standard deviation, likewise.

    Raises:
        OptionError: If the images are grey, or the file does not hold these weights.
    """
    require(images.shape[-1] == 3, f"the images are grey, and {type(module).__name__} was trained on colours")
    model = network(module, mean, std, options)
    fresh = jax.eval_shape(model.init, jax.random.key(0), images[:1])
    try:
        variables, _ = checkpoints.from_torch(checkpoints.load_weights(weights), fresh, module.torch_rules())
    except ValueError as error:
        told = "; ".join(str(error).splitlines()[:2])  # without the list of what is missing
        raise OptionError(f"--weights {weights}: {told}; `python -m jaxkd convert` tells more") from error
    return distill.Pretrained(name, model, jax.device_put(variables))


def few_labels(dataset: data.Dataset, count: int) -> tuple[OfSeed, OfSeed]:
    """The training images of which `count` keep their label, as many of each class; each seed draws its own.

    Returns:
        Those images alone; and all of them, where `labelled` tells which those are.

    Raises:
        DataError: If there are not as many images of each class.
    """
    images, labels = dataset.train
    data.balanced_subset(labels, count, jax.random.key(0))  # refuses a wrong number at once

    def kept(seed: int) -> Any:
        return data.balanced_subset(labels, count, jax.random.fold_in(jax.random.key(seed), count))

    def few(seed: int) -> dict[str, Any]:
        chosen = kept(seed)
        return {"inputs": images[chosen], "labels": labels[chosen]}

    def partly(seed: int) -> dict[str, Any]:
        labelled = np.isin(np.arange(len(labels)), kept(seed))
        # A label that is not kept is nowhere in what a student gets.
        return {"inputs": images, "labels": np.where(labelled, labels, 0), "labelled": labelled}

    return few, partly


def steps(options: Options, dataset: data.Dataset, *, epochs: int | None = None) -> int:
    """How many steps the options' epochs take, or `epochs` of them, over all training images."""
    return math.ceil((options.epochs if epochs is None else epochs) * len(dataset.train.labels) / options.batch_size)


def stage(
    name: str,
    model: models.Model,
    examples: Examples,
    loss: Loss,
    options: Options,
    *,
    steps: int,
    **more: Any,
) -> distill.Stage:
    """A stage with the options' optimizer, batch size and augmentation."""
    tx = optax.adam(optax.cosine_decay_schedule(options.learning_rate, steps))
    shown: dict[str, Any] = {"augment": data.crop_and_flip, "views": options.views} if options.augment else {}
    return distill.Stage(name, model, examples, loss, tx, steps, batch_size=options.batch_size, **shown | more)


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


def workdir(experiment: str, options: Options) -> Path:
    """The directory that the options name, or one below runs/ that is named after them."""
    if options.workdir:
        return Path(options.workdir).expanduser()
    named = {name: value for name, value in dataclasses.asdict(options).items() if name not in runs.INCIDENTAL}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / experiment / f"{Path(options.dataset).name}-{digest}"


class Done(NamedTuple):
    """What a run left.

    Attributes:
        folder: Its directory.
        rows: The table's.
        trained: For each stage, what it left, an entry a seed.
    """

    folder: Path
    rows: list[dict]
    trained: dict[str, list[distill.Trained]]


def run(
    experiment: str,
    options: Options,
    dataset: data.Dataset,
    plan: Sequence[distill.Stage | distill.Pretrained],
    *,
    title: str,
    students: Sequence[str],
    comparisons: Sequence[tuple[str, str]],
    reference: str = "teacher",
    unlisted: Sequence[str] = (),
    alike: int = 1,
) -> Done:
    """Runs a plan and leaves results, report, figures and the best student.

    Args:
        experiment: Name of the script, for the run's directory.
        options: Its options.
        dataset: The images.
        plan: The stages and pretrained models.
        title: The report's.
        students: Stages of which the best is exported: the highest mean validation accuracy, then the best seed.
        comparisons: Pairs of stages that the report compares.
        reference: The one with which agreement is measured.
        unlisted: Those that the tables leave out.
        alike: How many stages differ in numbers alone, and so may train at once.

    Returns:
        What is left.
    """
    config = dataclasses.asdict(options)
    folder = workdir(experiment, options)
    opened = runs.open_run(folder, {"experiment": experiment} | config, arrays=_arrays(dataset))
    seeds = range(options.seed, options.seed + options.seeds)
    trained = distill.run_plan(
        plan,
        seeds,
        opened,
        validation=_batch(dataset.validation),
        save_every=options.save_every,
        devices=devices(options, alike=alike),
        teacher_cache=options.teacher_cache,
    )
    listed = [one for one in plan if one.name not in unlisted]
    rows = distill.results(listed, trained, _batch(dataset.test), reference=reference)
    if not parallel.is_first_host():
        return Done(folder, rows, trained)
    opened.write_results(rows)
    report.write_report(
        folder,
        title=title,
        rows=rows,
        metrics=opened.metrics(),
        comparisons=comparisons,
        settings=opened.config,
        environment=opened.environment,
    )
    best = max(students, key=lambda name: sum(one.validation_accuracy for one in trained[name]))
    winner = max(trained[best], key=lambda one: one.validation_accuracy)
    model = next(one.model for one in plan if one.name == best)
    export.save_safetensors(folder / "student.safetensors", winner.variables)
    export.save_program(folder / "student.jaxexport", model, winner.variables, dataset.test.images[0])
    report.print_table(rows)
    for name, baseline in comparisons:
        print(report.compare(rows, name, baseline))
    print(f"The best student by validation, {best}, is exported. Everything is in {folder}: begin with report.md")
    return Done(folder, rows, trained)


def _arrays(dataset: data.Dataset) -> list:
    return [array for split in (dataset.train, dataset.validation, dataset.test) for array in split]


def _batch(split: data.Split) -> dict:
    return {"inputs": split.images, "labels": split.labels}
