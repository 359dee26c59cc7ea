"""MobileNetV2, as torchvision's, and the inverted residual blocks that EfficientNet has too."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
from jax import Array

from jaxkd import layout
from jaxkd.models.convolution import Conv, convolve, depthwise_convolve
from jaxkd.models.layers import BatchNorm, batch_norm_rules, check_images, dense_rules
from jaxkd.models.model import Outputs
from jaxkd.models.resnet import HE_FAN_OUT
from jaxkd.transfer import Rule


def round_channels(channels: float) -> int:
    """Rounds to a multiple of 8: to the nearest, or up if that is less than nine tenths.

    Args:
        channels: A number of channels times a width multiplier.

    Returns:
        The number of channels, 8 or more.

    Example:
        >>> from jaxkd.models.mobilenet import round_channels
        >>> [round_channels(32 * width) for width in (0.1, 0.35, 0.75, 1.1)]
        [8, 16, 24, 32]
    """
    # The rule of TensorFlow's code, which torchvision copies.
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class BlockGroup(NamedTuple):
    """Inverted residual blocks of one stage, a row of the papers' tables.

    Attributes:
        expansion: Factor by which a block widens its input; with 1, it has no first convolution.
        channels: Output channels.
        blocks: Number of blocks.
        stride: Stride of the first block; the others have 1.
        kernel: Side of the depth-wise kernels.
    """

    expansion: int
    channels: int
    blocks: int
    stride: int
    kernel: int = 3


class ConvNormConfig(NamedTuple):
    """Settings that all convolutions of a network share.

    Attributes:
        activation: Applied after the normalisation.
        same_padding: Pads as TensorFlow's SAME, where a stride of 2 pads the end more than the
            start. If false, pads as PyTorch's `padding=kernel // 2`.
        momentum: Momentum of the batch normalisation, one minus PyTorch's.
        epsilon: Epsilon of the batch normalisation.
    """

    activation: Callable[[Array], Array]
    same_padding: bool = False
    momentum: float = 0.9
    epsilon: float = 1e-5


class InvertedResidualNet(nn.Module):
    """Network of inverted residual blocks, from images to logits.

    It has a 3×3 convolution of stride 2, stages of blocks, a 1×1 convolution, the mean over the
    image and a dense layer. `MobileNetV2`, `EfficientNet` and `EfficientNetLite` are such networks,
    with different numbers and different names of their weights in PyTorch.

    Convolutions are initialised as He et al. propose, by fan-out. For a depth-wise convolution this
    is the area of its kernel, as in TensorFlow's originals; torchvision multiplies it by the
    channels.

    Attributes:
        stages: The blocks of each stage.
        stem: Channels of the first convolution.
        head: Channels of the last convolution.
        config: Settings of all convolutions.
        num_classes: Number of logits.
        squeeze: Blocks have squeeze-and-excitation, with a quarter of the block's input channels.
        dropout: Probability of dropping a value before the logits.
        drop_connect: Probability of dropping a residual branch for an example. It grows with depth:
            block n of N, counted from 0, has `drop_connect * n / N`.
        logits_init: Initialisation of the dense layer's kernel.
    """

    stages: Sequence[BlockGroup]
    stem: int
    head: int
    config: ConvNormConfig
    num_classes: int = 1000
    squeeze: bool = False
    dropout: float = 0.2
    drop_connect: float = 0.0
    logits_init: nn.initializers.Initializer = nn.initializers.normal(0.01)

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Classifies images.

        Args:
            inputs: Floating-point images `[B, H, W, C]`, of any size. The last stage works at 1/32
                of their height and width.
            train: If true, normalises by the statistics of the batch, updates the running ones, and
                applies dropout and drop-connect with the rng `dropout`.

        Returns:
            Logits `[B, num_classes]`; features `stem`, `stage1` … (after each row of the paper's
            table, where no activation follows) `[B, h, w, channels]`, and `pre_logits` (the last
            convolution's mean over the image, before dropout) `[B, head]`.

        Raises:
            ValueError: If the images are not `[B, H, W, C]`, are empty, or have other channels than
                the weights.
            TypeError: If the images are not floating-point.
        """
        check_images(inputs, self.get_variable("params", "stem", {}).get("conv"), min_size=1)
        x = ConvNorm(self.stem, self.config, kernel=3, stride=2, name="stem")(inputs, train)
        features = {"stem": x}
        blocks = self._blocks()
        for n, (i, j, group) in enumerate(blocks):
            block = InvertedResidual(
                group._replace(stride=1 if j else group.stride),
                self.config,
                self.squeeze,
                # By the number of blocks, not one less, as in TensorFlow's and torchvision's code.
                drop_rate=self.drop_connect * n / len(blocks),
                name=f"stage{i}_block{j}",
            )
            x = block(x, train)
            features[f"stage{i}"] = x
        x = ConvNorm(self.head, self.config, name="head")(x, train)
        x = features["pre_logits"] = x.mean((1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = nn.Dense(self.num_classes, kernel_init=self.logits_init, name="logits")(x)
        return Outputs(logits, features)

    def _blocks(self) -> list[tuple[int, int, BlockGroup]]:
        """Lists the blocks by their stage, from 1, their number in it, from 0, and their group."""
        return [
            (i, j, group)
            for i, group in enumerate(self.stages, start=1)
            for j in range(group.blocks)
        ]


class MobileNetV2(InvertedResidualNet):
    """MobileNetV2; see `mobilenet_v2`.

    References:
        Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks,
        https://arxiv.org/abs/1801.04381
    """

    def torch_rules(self) -> tuple[Rule, ...]:
        """Makes the rules from torchvision's names to this module's variables."""
        blocks = self._blocks()
        head = f"features.{len(blocks) + 1}"
        rules = [*conv_norm_rules("features.0.0", "features.0.1", "stem")]
        for n, (i, j, group) in enumerate(blocks, start=1):
            source = f"features.{n}.conv"
            target = f"stage{i}_block{j}"
            parts = ("expand", "depthwise") if group.expansion > 1 else ("depthwise",)
            for k, part in enumerate(parts):
                rules += conv_norm_rules(f"{source}.{k}.0", f"{source}.{k}.1", f"{target}/{part}")
            # The projection has no activation, and torchvision does not nest it.
            k = len(parts)
            rules += conv_norm_rules(f"{source}.{k}", f"{source}.{k + 1}", f"{target}/project")
        rules += conv_norm_rules(f"{head}.0", f"{head}.1", "head")
        return *rules, *dense_rules("classifier.1", "logits")


def mobilenet_v2(num_classes: int = 1000, width: float = 1.0) -> MobileNetV2:
    """MobileNetV2, 3,504,872 parameters with 1,000 classes.

    Args:
        num_classes: Number of logits.
        width: Multiplier of all channels; below 1, it does not narrow the last convolution.

    Returns:
        The module.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import from_linen
        >>> from jaxkd.models.mobilenet import mobilenet_v2
        >>> model = from_linen(mobilenet_v2(num_classes=10, width=0.5))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 96, 96, 3)))
        >>> variables["params"]["stage7_block0"]["project"]["conv"]["kernel"].shape
        (1, 1, 480, 160)
    """
    table = (
        BlockGroup(1, 16, 1, 1),
        BlockGroup(6, 24, 2, 2),
        BlockGroup(6, 32, 3, 2),
        BlockGroup(6, 64, 4, 2),
        BlockGroup(6, 96, 3, 1),
        BlockGroup(6, 160, 3, 2),
        BlockGroup(6, 320, 1, 1),
    )
    return MobileNetV2(
        tuple(row._replace(channels=round_channels(width * row.channels)) for row in table),
        stem=round_channels(width * 32),
        # The paper does not narrow the last convolution, which improves small networks.
        head=round_channels(max(width, 1.0) * 1280),
        config=ConvNormConfig(nn.relu6),
        num_classes=num_classes,
    )


class InvertedResidual(nn.Module):
    """Block of a 1×1 convolution that widens, a depth-wise one, and a 1×1 one that narrows.

    The last convolution has no activation. The input is added to the output if their shapes are
    equal.

    Attributes:
        group: The block's numbers; `blocks` is not used.
        config: Settings of the convolutions.
        squeeze: Adds squeeze-and-excitation.
        drop_rate: Probability with which, in training, an example takes only the shortcut; the
            other examples are scaled up.
    """

    group: BlockGroup
    config: ConvNormConfig
    squeeze: bool = False
    drop_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps `[B, H, W, C]` to `[B, H / stride, W / stride, channels]`."""
        group = self.group
        y = x
        if group.expansion > 1:
            y = ConvNorm(group.expansion * x.shape[-1], self.config, name="expand")(y, train)
        depthwise = ConvNorm(
            y.shape[-1], self.config, group.kernel, group.stride, depthwise=True, name="depthwise"
        )
        y = depthwise(y, train)
        if self.squeeze:
            # A quarter of the block's input channels, before they are expanded.
            squeezed = max(1, x.shape[-1] // 4)
            y = SqueezeExcite(squeezed, self.config.activation, name="squeeze_excite")(y)
        y = ConvNorm(group.channels, self.config, linear=True, name="project")(y, train)
        # A block of stride 1 that changes the channels has no shortcut either.
        if x.shape != y.shape:
            return y
        # One draw per example drops its whole residual branch.
        drop = nn.Dropout(self.drop_rate, broadcast_dims=(1, 2, 3), deterministic=not train)
        return x + drop(y)


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation and activation.

    Attributes:
        channels: Output channels.
        config: Activation, padding and normalisation.
        kernel: Side of the kernel.
        stride: The stride.
        depthwise: Each channel has its own kernel.
        linear: Omits the activation.
    """

    channels: int
    config: ConvNormConfig
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False
    linear: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps `[B, H, W, C]` to `[B, H / stride, W / stride, channels]`."""
        x = nn.Conv(
            self.channels,
            (self.kernel,) * 2,
            self.stride,
            padding="SAME" if self.config.same_padding else self.kernel // 2,
            feature_group_count=self.channels if self.depthwise else 1,
            conv_general_dilated=depthwise_convolve if self.depthwise else convolve,
            use_bias=False,
            kernel_init=HE_DEPTHWISE if self.depthwise else HE_FAN_OUT,
            name="conv",
        )(x)
        norm = BatchNorm(
            not train, momentum=self.config.momentum, epsilon=self.config.epsilon, name="bn"
        )
        return norm(x) if self.linear else self.config.activation(norm(x))


HE_DEPTHWISE = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""He's initialisation by the fan-out of one channel, the kernel's area, which Flax calls fan-in."""


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: scales the channels by gates computed from their means.

    Attributes:
        channels: Width of the hidden layer.
        activation: Activation of the hidden layer.

    References:
        Hu et al., Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507
    """

    channels: int
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[B, H, W, C]` to the same shape."""
        # 1×1 convolutions on a single pixel instead of dense layers, as torchvision stores them.
        y = x.mean((1, 2), keepdims=True)
        y = self.activation(Conv(self.channels, (1, 1), kernel_init=HE_FAN_OUT, name="squeeze")(y))
        gate = nn.sigmoid(Conv(x.shape[-1], (1, 1), kernel_init=HE_FAN_OUT, name="excite")(y))
        return x * gate


def conv_norm_rules(conv: str, norm: str, target: str) -> tuple[Rule, ...]:
    """Makes the rules from a PyTorch convolution and batch normalisation to a `ConvNorm`.

    Args:
        conv: Name of PyTorch's convolution.
        norm: Name of PyTorch's normalisation.
        target: Path of the `ConvNorm`.

    Returns:
        The rules.
    """
    return (
        Rule(f"{conv}.weight", f"params/{target}/conv/kernel", layout.CONV),
        *batch_norm_rules(norm, f"{target}/bn"),
    )
