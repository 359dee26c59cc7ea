"""The subcommand `jaxkd distill`: a teacher, a student and what the student learns from it."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxkd.cli.errors import show_warning

if TYPE_CHECKING:
    from jaxkd import distill, models
    from jaxkd.cli.image_networks import Teacher
    from jaxkd.data import Dataset

# Each paragraph is one short line: see jaxkd.cli.convert.
DESCRIPTION = """Distil a teacher into a student on your images, in one command.

--data is fashion_mnist_mini, a TFDS name, or a folder with train/CLASS/ and test/CLASS/.

It trains a student on labels alone and one with each --method, and compares them.

The same command resumes a stopped run. The best student is in the run's folder.

A network is a name of jaxkd.models, with keywords in quotes if any.

Examples:
  python -m jaxkd distill --data photos --image-size 64 --augment
  python -m jaxkd distill --data fashion_mnist_mini --num-labels 500
  python -m jaxkd distill --data cifar10 --teacher resnet56:resnet56.th \\
      --student resnet20 --method kd dkd dist --num-seeds 5
  python -m jaxkd distill --data photos --teacher runs/large \\
      --student 'CNN(features=(16, 32), hidden=32)'"""


@dataclasses.dataclass(frozen=True)
class DistillCommand:
    """Options of `jaxkd distill`."""

    data: str
    """Data set: a name or a folder."""
    teacher: str = "auto"
    """A network to train, NETWORK:FILE with weights, or the folder of a run. auto trains a CNN."""
    student: str = "auto"
    """The student's network. auto is a small CNN."""
    assistant: str | None = None
    """A network between the two, which learns from the teacher and teaches further students."""
    method: tuple[str, ...] = ("kd",)
    """Methods of distillation, which are compared: kd, dkd, dist, crd, attention, ..."""
    num_seeds: int = 3
    """Number of seeds; everything is trained once for each."""
    seed: int = 0
    """The first seed."""
    num_labels: int | None = None
    """Number of training images that keep their label for the students. By default all."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 128
    """Number of images in a training step."""
    learning_rate: float = 1e-3
    """Initial learning rate of Adam. It falls to 0 along a cosine."""
    temperature: float = 4.0
    """Temperature of the soft targets."""
    alpha: float = 0.9
    """Weight of the soft targets in kd, from 0 to 1. The labels have the rest."""
    image_size: int | None = None
    """Side in pixels to which a folder's images are fitted. By default 64."""
    augment: bool = False
    """Crops and flips the images at random."""
    teacher_mean: tuple[float, ...] = ()
    """Mean of each channel with which the teacher's weights were trained, from 0 to 1."""
    teacher_std: tuple[float, ...] = ()
    """Standard deviation of each channel with which the teacher's weights were trained."""
    data_dir: str | None = None
    """Folder of the TFDS data sets."""
    evaluations: int = 10
    """Number of evaluations of each network during training."""
    save_every: float = 15.0
    """Seconds between checkpoints."""
    deterministic: bool = False
    """Makes a GPU compute the same bits at every run, more slowly."""
    workdir: str | None = None
    """Folder of the run. By default one in runs/distill/ named after data and options."""

    def execute(self) -> None:
        """Trains teacher and students, compares them and saves the best student."""
        self._check()
        from jaxkd import data, distill, runs
        from jaxkd.cli import start
        from jaxkd.cli.folders import choose_folder

        start.print_any_text()
        start.keep_freed_memory()
        start.keep_compiled_programs()
        if self.deterministic:
            runs.enable_determinism()
        warnings.showwarning = show_warning
        dataset = data.load(self.data, self.data_dir, image_size=self.image_size)
        plan = make_plan(self, dataset)
        config = {"command": "distill"} | dataclasses.asdict(self)
        arrays = [array for split in dataset[:3] for array in split]
        run = runs.open_run(choose_folder("distill", self, self.data), config, arrays=arrays)
        trained = distill.run_plan(
            plan,
            range(self.seed, self.seed + self.num_seeds),
            run,
            validation=dataset.validation.examples,
            evaluations=self.evaluations,
            save_every=self.save_every,
        )
        names = [entry.name for entry in plan]
        students = [name for name in names if name.startswith("student")]
        distill.save_results(
            run,
            plan,
            trained,
            dataset.test.examples,
            title=f"Distillation on {Path(self.data).name}",
            class_names=dataset.class_names,
            students=students,
            comparisons=_choose_comparisons(students),
            unlisted=["pretrained"] if "pretrained" in names else [],
        )
        print(f"Classify files with it: jaxkd predict {run.folder} FILES")

    def _check(self) -> None:
        """Raises `ValueError` for an invalid option."""
        from jaxkd.cli.limits import check_limits

        check_limits(self, _require)
        for name in ("num_seeds", "epochs", "batch_size", "evaluations"):
            _require(getattr(self, name) >= 1, f"{_option(name)}: must be at least 1")
        for name in ("learning_rate", "temperature"):
            _require(getattr(self, name) > 0, f"{_option(name)}: must be above 0")
        _require(0 <= self.alpha <= 1, "--alpha: must be from 0 to 1")
        _require(self.seed >= 0, "--seed: must be at least 0")
        _require(self.save_every >= 0, "--save-every: must be at least 0")
        _require(bool(self.method), "--method: name at least one")
        _require(len({*self.method}) == len(self.method), "--method names one twice")
        _require(
            bool(self.teacher_mean) == bool(self.teacher_std),
            "--teacher-mean and --teacher-std: give both, or none",
        )


def make_plan(
    options: DistillCommand, dataset: "Dataset"
) -> "list[distill.Stage | distill.Pretrained]":
    """Makes the plan: teacher, assistant if there is one, and students.

    Raises:
        ValueError: If a network or a method does not exist, or does not fit the data.
    """
    from jaxkd import data
    from jaxkd.cli import image_networks
    from jaxkd.distill import methods

    size = dataset.train.images.shape[1]
    statistics = (options.teacher_mean, options.teacher_std) if options.teacher_mean else None
    teacher = image_networks.choose_teacher(options.teacher, dataset, statistics=statistics)
    description = options.student
    if description == "auto":
        description = image_networks.describe_default(size, is_teacher=False)
        print(f"the student is {description}")
    student = image_networks.make_network(description, dataset, option="--student")
    everything = labelled = dataset.train.examples
    partly: Any = everything
    if options.num_labels is not None:
        labelled, partly = data.few_labels(everything, options.num_labels)
    steps = _count_steps(options, len(dataset.train.labels))

    def stage(name: str, model: "models.Model", examples: Any, loss: Any, **more: Any) -> Any:
        return _make_stage(options, name, model, examples, loss, steps, **more)

    plan = _make_teacher(teacher, everything, stage)
    plan.append(stage("student_alone", student, labelled, methods.supervised_loss))
    sources = [("teacher", teacher.model, "")]
    if options.assistant is not None:
        assistant = image_networks.make_network(options.assistant, dataset, option="--assistant")
        loss = methods.make_soft_target_loss(temperature=options.temperature, alpha=options.alpha)
        plan.append(stage("assistant", assistant, partly, loss, teachers=("teacher",)))
        sources.append(("assistant", assistant, "_assisted"))
    for source, model, suffix in sources:
        for method in options.method:
            loss, init_loss = _make_loss(options, method, student, model, dataset)
            plan.append(
                stage(
                    f"student_{method}{suffix}",
                    student,
                    partly,
                    loss,
                    teachers=(source,),
                    init_loss=init_loss,
                    # A cache has no features.
                    cache_teachers=method in methods.LOGIT_METHODS and not options.augment,
                )
            )
    return plan


def _make_teacher(teacher: "Teacher", examples: Any, stage: Callable[..., Any]) -> list[Any]:
    """Makes the entries of the teacher: a pretrained model, a stage, or both."""
    from jaxkd import models
    from jaxkd.cli.image_networks import transfer_all_but_head
    from jaxkd.distill.methods import supervised_loss

    if teacher.pretrained is None:
        return [stage("teacher", teacher.model, examples, supervised_loss)]
    if not teacher.is_fine_tuned:
        return [teacher.pretrained]
    fine_tuned = stage(
        "teacher",
        # A batch is too small to estimate the statistics, so those of the weights are kept.
        models.with_frozen_batch_stats(teacher.model),
        examples,
        supervised_loss,
        start="pretrained",
        transfer=transfer_all_but_head,
    )
    return [teacher.pretrained, fine_tuned]


def _make_stage(
    options: DistillCommand,
    name: str,
    model: "models.Model",
    examples: Any,
    loss: Any,
    steps: int,
    **more: Any,
) -> "distill.Stage":
    import optax

    from jaxkd import data, distill

    return distill.Stage(
        name,
        model,
        examples,
        loss,
        optax.adam(optax.cosine_decay_schedule(options.learning_rate, steps)),
        steps,
        batch_size=options.batch_size,
        augment=data.crop_and_flip if options.augment else None,
        **more,
    )


def _make_loss(
    options: DistillCommand,
    name: str,
    student: "models.Model",
    teacher: "models.Model",
    dataset: "Dataset",
) -> tuple[Any, Any]:
    """Makes the loss of a method, and what draws its parameters, if it has any."""
    from jaxkd.cli.image_networks import infer_outputs
    from jaxkd.distill import methods

    if name == "kd":
        loss = methods.make_soft_target_loss(temperature=options.temperature, alpha=options.alpha)
        return loss, None
    if options.num_labels is not None and name in methods.LABEL_METHODS:
        raise ValueError(
            f"--method {name} reads the label of every image: leave out --num-labels, or choose "
            "another method, such as kd"
        )
    outputs = [infer_outputs(model, dataset) for model in (student, teacher)]
    try:
        method = methods.make_method(name, *outputs, temperature=options.temperature)
    except ValueError as error:
        raise ValueError(f"--method {name[:40]}: {error}") from error
    return methods.make_loss(method), method.init


def _choose_comparisons(students: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs each distilled student with the one without teacher, or with the direct one."""
    pairs = []
    for name in students[1:]:
        direct = name.removesuffix("_assisted")
        pairs.append((name, "student_alone" if direct == name else direct))
    return pairs


def _count_steps(options: DistillCommand, num_examples: int) -> int:
    from jaxkd.cli.limits import LARGEST_INTEGER

    # In integers, because a float cannot hold a large product.
    steps = -(-options.epochs * num_examples // options.batch_size)
    _require(steps <= LARGEST_INTEGER, f"--epochs {options.epochs}: too many steps, {steps:,}")
    return steps


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
