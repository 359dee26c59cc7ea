"""Plain networks of the teacher-assistant paper: 2, 4, 6, 8 or 10 normalised convolutions."""

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from jaxkd import layout
from jaxkd.models.cnn import max_pool
from jaxkd.models.convolution import Conv
from jaxkd.models.layers import BatchNorm, batch_norm_rules, check_images, dense_rules
from jaxkd.models.model import Outputs
from jaxkd.transfer import Rule


class PlainCNN(nn.Module):
    """Stages of 3×3 convolutions with batch normalisation and ReLU, then dense layers.

    Each stage ends in 2×2 max-pooling. The kernels are initialised as in PyTorch, uniform in
    ±1/√fan-in, which the authors leave at its default; biases are initialised to 0.

    Attributes:
        stages: Output channels of each convolution of each stage.
        hidden: Width of the dense layer before the classifier; `None` for no such layer.
        num_classes: Number of logits.

    References:
        Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant",
        https://arxiv.org/abs/1902.03393
    """

    stages: Sequence[Sequence[int]]
    hidden: int | None = None
    num_classes: int = 10

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Classifies images.

        Args:
            inputs: Floating-point images `[B, H, W, C]`, large enough to be halved by every stage.
            train: If true, normalises by the statistics of the batch and updates the running ones.

        Returns:
            Logits `[B, num_classes]`; features `stage1` … (after ReLU and pooling)
            `[B, h, w, stages[i][-1]]` and `pre_logits`, the input of the classifier, `[B, hidden]`,
            or `[B, h·w·stages[-1][-1]]` without the hidden layer.

        Raises:
            ValueError: If the images are not `[B, H, W, C]`, are too small, or have another size or
                other channels than the weights.
            TypeError: If the images are not floating-point.
        """
        check_images(
            inputs, self.get_variable("params", "stage1_conv0"), min_size=2 ** len(self.stages)
        )
        # Uniform with variance 1 / (3 fan-in) has the bound ±1/√fan-in.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        x = inputs
        features = {}
        for i, widths in enumerate(self.stages, start=1):
            for j, width in enumerate(widths):
                x = Conv(width, (3, 3), padding=1, kernel_init=init, name=f"stage{i}_conv{j}")(x)
                x = nn.relu(BatchNorm(use_running_average=not train, name=f"stage{i}_bn{j}")(x))
            x = features[f"stage{i}"] = max_pool(x)
        x = x.reshape(x.shape[0], -1)
        self._check_flat_size(inputs, x)
        if self.hidden is not None:
            x = nn.relu(nn.Dense(self.hidden, kernel_init=init, name="hidden")(x))
        features["pre_logits"] = x
        return Outputs(nn.Dense(self.num_classes, kernel_init=init, name="logits")(x), features)

    def torch_rules(self) -> tuple[Rule, ...]:
        """Makes the rules from the names of PyTorch's weights to this module's variables.

        Returns:
            Rules for the names of the authors, imirzadeh/Teacher-Assistant-Knowledge-Distillation.
        """
        rules = []
        # PyTorch numbers all layers, also those without weights.
        number = 0
        for i, widths in enumerate(self.stages, start=1):
            for j in range(len(widths)):
                rules += dense_rules(f"conv_layers.{number}", f"stage{i}_conv{j}", layout.CONV)
                rules += batch_norm_rules(f"conv_layers.{number + 1}", f"stage{i}_bn{j}")
                number += 3  # convolution, normalisation, ReLU
            number += 1  # pooling
        flattened = layout.flattened_dense(channels=self.stages[-1][-1])
        if self.hidden is None:
            return *rules, *dense_rules("fc_layers.0", "logits", flattened)
        return (
            *rules,
            *dense_rules("fc_layers.0", "hidden", flattened),
            *dense_rules("fc_layers.2", "logits"),
        )

    def _check_flat_size(self, inputs: Array, flat: Array) -> None:
        """Checks that the first dense layer was initialised for images of this size."""
        # Flax's own error would name the shapes of the kernel, not of the images.
        dense = self.get_variable("params", "logits" if self.hidden is None else "hidden")
        if dense is not None and len(dense["kernel"]) != flat.shape[-1]:
            raise ValueError(
                "the weights are for images of another size than "
                f"{inputs.shape[1]}×{inputs.shape[2]}: the dense layer expects "
                f"{len(dense['kernel'])} values and gets {flat.shape[-1]}; resize the images, or "
                "initialise weights for this size"
            )


def plain2(num_classes: int = 10) -> PlainCNN:
    """2 convolutions; 13,082 parameters at 10 classes.

    These are the paper's networks for CIFAR-10; those for CIFAR-100 are wider.

    Args:
        num_classes: Number of logits.

    Returns:
        The module, for `from_linen`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import from_linen
        >>> model = from_linen(plain2())
        >>> images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        13082
    """
    return PlainCNN(((16,), (16,)), num_classes=num_classes)


def plain4(num_classes: int = 10) -> PlainCNN:
    """4 convolutions, otherwise as `plain2`; 37,338 parameters at 10 classes."""
    return PlainCNN(((16, 16), (32, 32)), num_classes=num_classes)


def plain6(num_classes: int = 10) -> PlainCNN:
    """6 convolutions, otherwise as `plain2`; 82,778 parameters at 10 classes."""
    return PlainCNN(((16, 16), (32, 32), (64, 64)), num_classes=num_classes)


def plain8(num_classes: int = 10) -> PlainCNN:
    """8 convolutions, a dense layer of 64, as `plain2`; 327,962 parameters at 10 classes."""
    return PlainCNN(((16, 16), (32, 32), (64, 64), (128, 128)), 64, num_classes)


def plain10(num_classes: int = 10) -> PlainCNN:
    """10 convolutions, a dense layer of 128, as `plain2`; 2,487,850 parameters at 10 classes."""
    return PlainCNN(((32, 32), (64, 64), (128, 128), (256, 256, 256, 256)), 128, num_classes)
