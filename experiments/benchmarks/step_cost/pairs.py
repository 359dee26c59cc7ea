"""The pairs of teacher and student, and a step's arguments, from `training_cases`."""

from typing import NamedTuple

import jax
import numpy as np
import optax

from experiments.benchmarks.training_cases import (
    LARGE_CNN,
    LEARNING_RATE,
    LSTM,
    MINILM,
    MOMENTUM,
    RESNET_20,
    RESNET_56,
    SMALL_CNN,
    VOCABULARY,
    WRN_16_2,
    WRN_40_2,
    Network,
    jax_model,
    make_images,
    make_texts,
)
from experiments.benchmarks.training_cases import label_or_distillation_loss as distillation_loss
from jaxkd import models

__all__ = ["PAIRS", "TINY_PAIRS", "Pair", "distillation_loss"]


class Pair(NamedTuple):
    """A student and the teacher from which it learns."""

    title: str
    teacher: Network
    student: Network
    on_texts: bool = False

    def models(self) -> tuple[models.Model, models.Model]:
        """Makes the models of teacher and student."""
        return jax_model(self.teacher, bf16=False), jax_model(self.student, bf16=False)

    def batch(self, size: int) -> dict[str, np.ndarray]:
        """Draws inputs and labels of a batch: images 32×32×3 in float32, or 32 tokens in int32."""
        batch = make_texts(size) if self.on_texts else make_images(size)
        # As JAX stores integers.
        return {
            name: array.astype(np.int32) if array.dtype == np.int64 else array
            for name, array in batch.items()
        }

    def shapes(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of a batch."""
        arrays = self.batch(size)
        return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}


def make_optimizer() -> optax.GradientTransformation:
    """Makes the students' optimizer, SGD with momentum."""
    return optax.sgd(LEARNING_RATE, momentum=MOMENTUM)


PAIRS = {
    "cnn": Pair("CNN, from one of twice the channels", LARGE_CNN, SMALL_CNN),
    "resnet20": Pair("ResNet-20, from ResNet-56", RESNET_56, RESNET_20),
    "wrn16_2": Pair("WRN-16-2, from WRN-40-2", WRN_40_2, WRN_16_2),
    "lstm": Pair("LSTM, from MiniLM", MINILM, LSTM, on_texts=True),
}
TINY_LSTM = Network("LSTMClassifier", (VOCABULARY, 4, (4,), 4))
TINY_PAIRS = {
    # With batch normalisation, which has sums of its own.
    "tiny_cnn": Pair("tiny CNN", Network("CNN", ((8,), 8)), Network("PlainCNN", (((4,),),))),
    "tiny_lstm": Pair("tiny LSTM", TINY_LSTM, TINY_LSTM, on_texts=True),
}
