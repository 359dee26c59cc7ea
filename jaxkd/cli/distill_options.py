"""The options of `jaxkd distill`."""

import dataclasses
from typing import Literal

from jaxkd.cli.errors import option_name, require


@dataclasses.dataclass(frozen=True)
class DistillOptions:
    """Options of `jaxkd distill`."""

    data: str
    """Data set: a name, a folder, or a table of texts."""
    kind: Literal["auto", "images", "texts"] = "auto"
    """What the data are. By default texts if they are a table, a folder with tables, or a TFDS set
    of texts."""
    teacher: str = "auto"
    """A network to train; for images NETWORK:FILE with weights, or the folder of a run; for texts
    the folder, package or hub:owner/name of a BERT, which is fine-tuned unless it classifies the
    data's classes. auto trains a CNN or an LSTM."""
    student: str = "auto"
    """The student's network. auto is a small CNN or LSTM; BERT(layers=3) has layers of the
    teacher."""
    assistant: str | None = None
    """A network between the two, which learns from the teacher and teaches further students."""
    method: tuple[str, ...] = ("kd",)
    """Methods of distillation, which are compared: kd, dkd, dist, crd, attention, ..."""
    num_seeds: int = 3
    """Number of seeds; everything is trained once for each."""
    seed: int = 0
    """The first seed."""
    num_labels: int | None = None
    """Number of training examples that keep their label for the students. By default all."""
    epochs: int | None = None
    """Passes over the training examples. By default 10 for images, 6 for texts."""
    batch_size: int | None = None
    """Number of examples in a training step. By default 128 images, 32 texts."""
    learning_rate: float | None = None
    """Initial learning rate of Adam, which falls to 0 along a cosine. By default 1e-3 for images,
    2e-3 for texts."""
    temperature: float = 4.0
    """Temperature of the soft targets."""
    alpha: float = 0.9
    """Weight of the soft targets in kd, from 0 to 1. The labels have the rest."""
    image_size: int | None = None
    """Side in pixels to which a folder's images are fitted. By default 64."""
    stream: bool = False
    """Reads images from disk batch by batch. By default only if they would take more than half of
    the memory."""
    augment: bool = False
    """Crops and flips the images at random."""
    mix: Literal["none", "mixup", "cutmix"] = "none"
    """Mixes the images of a batch, and their labels."""
    teacher_mean: tuple[float, ...] = ()
    """Mean of each channel with which the teacher's weights were trained, from 0 to 1."""
    teacher_std: tuple[float, ...] = ()
    """Standard deviation of each channel with which the teacher's weights were trained."""
    text_column: str | None = None
    """Column of a table that holds the texts: its name, or its number from 1."""
    label_column: str | None = None
    """Column of a table that holds the classes."""
    max_length: int | None = None
    """Number of tokens to which longer texts are cut."""
    data_dir: str | None = None
    """Folder of the TFDS data sets."""
    ema_decay: float | None = None
    """Returns a moving average of each network's weights, with at most this weight of the old
    average, such as 0.999. By default the weights themselves."""
    best: Literal["none", "accuracy", "loss"] = "none"
    """Returns the weights of the evaluation that is best on validation. By default the last."""
    patience: int | None = None
    """Ends a training after as many evaluations without a better one. It needs --best."""
    evaluations: int = 10
    """Number of evaluations of each network during training."""
    save_every: float = 15.0
    """Seconds between checkpoints."""
    log: tuple[Literal["lines", "tensorboard", "wandb"], ...] = ()
    """Where evaluations are logged too, in the run's folder: a text file, or event files for
    TensorBoard, or Weights & Biases. metrics.jsonl has them in any case."""
    deterministic: bool = False
    """Makes a GPU compute the same bits at every run, more slowly."""
    workdir: str | None = None
    """Folder of the run; other options keep what they share. By default one in runs/distill/."""

    def check(self) -> None:
        """Raises `ValueError` for an invalid option."""
        from jaxkd.cli.limits import check_limits

        check_limits(self, require)
        for name in (
            "num_seeds",
            "num_labels",
            "epochs",
            "batch_size",
            "evaluations",
            "patience",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{option_name(name)}: must be at least 1")
        for name in ("learning_rate", "temperature"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{option_name(name)}: must be above 0")
        require(0 <= self.alpha <= 1, "--alpha: must be from 0 to 1")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1, "--ema-decay: must be between 0 and 1"
        )
        require(
            self.patience is None or self.best != "none",
            "--patience needs --best accuracy or --best loss",
        )
        require(self.seed >= 0, "--seed: must be at least 0")
        require(self.save_every >= 0, "--save-every: must be at least 0")
        require(bool(self.method), "--method: name at least one")
        require(len({*self.method}) == len(self.method), "--method names one twice")
        require(len({*self.log}) == len(self.log), "--log names one twice")
        require(
            bool(self.teacher_mean) == bool(self.teacher_std),
            "--teacher-mean and --teacher-std: give both, or none",
        )
