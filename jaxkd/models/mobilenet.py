"""MobileNetV2, with the names and numbers of torchvision's, and the inverted residuals that EfficientNet has too."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
from jax import Array

from jaxkd import layout
from jaxkd.models.convolution import Conv, convolve, depthwise
from jaxkd.models.layers import BatchNorm, check_images, dense_rules, norm_rules
from jaxkd.models.model import Outputs
from jaxkd.models.resnet import HE
from jaxkd.transfer import Rule


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, or the next one where that would be less than nine tenths.

    Args:
        channels: A number of channels times a width.

    Returns:
        The number of channels, 8 or more.

    Example:
        >>> from jaxkd.models.mobilenet import round_channels
        >>> [round_channels(32 * width) for width in (0.1, 0.35, 0.75, 1.1)]
        [8, 16, 24, 32]
    """
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class Stage(NamedTuple):
    """A group of inverted residuals; a row of the papers' tables.

    Attributes:
        expansion: How many times wider a block is inside; 1 leaves its first convolution out.
        channels: Output channels.
        blocks: Number of blocks.
        stride: Of the first block; the others have 1.
        kernel: Side of the depth-wise kernels.
    """

    expansion: int
    channels: int
    blocks: int
    stride: int
    kernel: int = 3


class Style(NamedTuple):
    """What all convolutions of a network have in common.

    Attributes:
        activation: Behind the normalisation.
        same: Pads as TensorFlow's SAME, where a stride of 2 pads the end more than the start; otherwise as PyTorch's
            `padding=kernel // 2`.
        momentum: The batch normalisation's: one minus PyTorch's.
        epsilon: The batch normalisation's.
    """

    activation: Callable[[Array], Array]
    same: bool = False
    momentum: float = 0.9
    epsilon: float = 1e-5


class InvertedResiduals(nn.Module):
    """A 3×3 convolution of stride 2, stages of inverted residuals, a 1×1 convolution, the mean, a dense layer.

    `MobileNetV2`, `EfficientNet` and `EfficientNetLite` are such networks, which differ in their numbers and in the
    names of their weights in PyTorch. Convolutions start as He's, by fan-out; that of a depth-wise one is its kernel's
    area, as in TensorFlow's originals, where torchvision multiplies it by the channels.

    Attributes:
        stages: The stages.
        stem: Channels of the first convolution.
        head: Channels of the last one.
        style: What all convolutions have in common.
        num_classes: Number of logits.
        squeeze: Blocks weigh their channels by squeeze and excitation, a quarter as wide as their input.
        dropout: Rate of dropout before the logits.
        drop_connect: Rate at which an example takes but the shortcut of a block; it rises to this from 0 at the first.
        logits_init: How the kernel of the dense layer starts.
    """

    stages: Sequence[Stage]
    stem: int
    head: int
    style: Style
    num_classes: int = 1000
    squeeze: bool = False
    dropout: float = 0.2
    drop_connect: float = 0.0
    logits_init: nn.initializers.Initializer = nn.initializers.normal(0.01)

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Classifies images.

        Args:
            inputs: Floating-point images `[B, H, W, C]`, of any size; the last stage sees them 32 times smaller.
            train: Normalise by the batch's statistics and move the running ones; drop by the rng `dropout`.

        Returns:
            Logits `[B, num_classes]`; features `stem`, `stage1` … (after each row of the paper's table; no activation
            follows there) `[B, h, w, channels]`, and `pre_logits` (the last convolution's mean over the image, before
            dropout) `[B, head]`.

        Raises:
            ValueError: If the images are not `[B, H, W, C]`, are empty, or have other channels than the weights.
            TypeError: If they are not floating-point.
        """
        check_images(inputs, self.get_variable("params", "stem", {}).get("conv"), least=1)
        x = ConvNorm(self.stem, self.style, kernel=3, stride=2, name="stem")(inputs, train)
        named, blocks = {"stem": x}, self._blocks()
        for n, (i, j, stage) in enumerate(blocks):
            stage, drop = stage._replace(stride=1 if j else stage.stride), self.drop_connect * n / len(blocks)
            x = InvertedResidual(stage, self.style, self.squeeze, drop, name=f"stage{i}_block{j}")(x, train)
            named[f"stage{i}"] = x
        x = ConvNorm(self.head, self.style, name="head")(x, train)
        x = named["pre_logits"] = x.mean((1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Outputs(nn.Dense(self.num_classes, kernel_init=self.logits_init, name="logits")(x), named)

    def _blocks(self) -> list[tuple[int, int, Stage]]:
        """Number of the stage, from 1, and of the block in it, from 0, and the stage."""
        return [(i, j, stage) for i, stage in enumerate(self.stages, start=1) for j in range(stage.blocks)]


class MobileNetV2(InvertedResiduals):
    """MobileNetV2; `mobilenet_v2` makes it.

    References:
        Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, https://arxiv.org/abs/1801.04381
    """

    def torch_rules(self) -> tuple[Rule, ...]:
        """From the names of torchvision's MobileNetV2 to this module's variables."""
        blocks = self._blocks()
        last = f"features.{len(blocks) + 1}"
        rules = [*conv_norm_rules("features.0.0", "features.0.1", "stem")]
        for n, (i, j, stage) in enumerate(blocks, start=1):
            inner = ("expand", "depthwise") if stage.expansion > 1 else ("depthwise",)
            source, target, k = f"features.{n}.conv", f"stage{i}_block{j}", len(inner)
            for m, part in enumerate(inner):
                rules += conv_norm_rules(f"{source}.{m}.0", f"{source}.{m}.1", f"{target}/{part}")
            rules += conv_norm_rules(f"{source}.{k}", f"{source}.{k + 1}", f"{target}/project")
        rules += conv_norm_rules(f"{last}.0", f"{last}.1", "head")
        return *rules, *dense_rules("classifier.1", "logits")


def mobilenet_v2(num_classes: int = 1000, width: float = 1.0) -> MobileNetV2:
    """MobileNetV2, 3,504,872 parameters with 1,000 classes.

    Args:
        num_classes: Number of logits.
        width: Multiplies all channels, but those of the last convolution only if it is more than 1.

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
    rows = (
        Stage(1, 16, 1, 1),
        Stage(6, 24, 2, 2),
        Stage(6, 32, 3, 2),
        Stage(6, 64, 4, 2),
        Stage(6, 96, 3, 1),
        Stage(6, 160, 3, 2),
        Stage(6, 320, 1, 1),
    )
    stages = tuple(row._replace(channels=round_channels(width * row.channels)) for row in rows)
    head = round_channels(max(width, 1.0) * 1280)
    return MobileNetV2(stages, round_channels(width * 32), head, Style(nn.relu6), num_classes=num_classes)


class InvertedResidual(nn.Module):
    """Widen by a 1×1 convolution, convolve channel by channel, narrow by a 1×1 without activation; add the input.

    The input is added where it has the shape of the result.

    Attributes:
        stage: The numbers of this block; those of `blocks` do not matter.
        style: What the convolutions have in common.
        squeeze: Weigh the channels by squeeze and excitation.
        drop: Rate at which an example takes but the shortcut in training; the others are scaled up.
    """

    stage: Stage
    style: Style
    squeeze: bool = False
    drop: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`[B, H, W, C]` to `[B, H / stride, W / stride, channels]`."""
        stage, y = self.stage, x
        if stage.expansion > 1:
            y = ConvNorm(stage.expansion * x.shape[-1], self.style, name="expand")(y, train)
        depthwise = ConvNorm(y.shape[-1], self.style, stage.kernel, stage.stride, depthwise=True, name="depthwise")
        y = depthwise(y, train)
        if self.squeeze:
            y = SqueezeExcite(max(1, x.shape[-1] // 4), self.style.activation, name="squeeze_excite")(y)
        y = ConvNorm(stage.channels, self.style, linear=True, name="project")(y, train)
        if x.shape != y.shape:
            return y
        return x + nn.Dropout(self.drop, broadcast_dims=(1, 2, 3), deterministic=not train)(y)


class ConvNorm(nn.Module):
    """A convolution without bias, its normalisation and its activation.

    Attributes:
        channels: Output channels.
        style: Activation, padding and normalisation.
        kernel: Side of the kernel.
        stride: The stride.
        depthwise: Every channel has a kernel of its own.
        linear: Leaves the activation out.
    """

    channels: int
    style: Style
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False
    linear: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`[B, H, W, C]` to `[B, H / stride, W / stride, channels]`."""
        x = nn.Conv(
            self.channels,
            (self.kernel,) * 2,
            self.stride,
            padding="SAME" if self.style.same else self.kernel // 2,
            feature_group_count=self.channels if self.depthwise else 1,
            conv_general_dilated=depthwise if self.depthwise else convolve,
            use_bias=False,
            kernel_init=HE_DEPTHWISE if self.depthwise else HE,
            name="conv",
        )(x)
        norm = BatchNorm(not train, momentum=self.style.momentum, epsilon=self.style.epsilon, name="bn")
        return norm(x) if self.linear else self.style.activation(norm(x))


HE_DEPTHWISE = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""He's initialisation by the fan-out of one channel, which is the kernel's area: Flax calls it the fan-in."""


class SqueezeExcite(nn.Module):
    """Weighs the channels by what the mean over the image says.

    Attributes:
        channels: Width of the layer between.
        activation: Behind that layer.

    References:
        Hu et al., Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507
    """

    channels: int
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, H, W, C]` to the same."""
        y = x.mean((1, 2), keepdims=True)
        y = self.activation(Conv(self.channels, (1, 1), kernel_init=HE, name="squeeze")(y))
        return x * nn.sigmoid(Conv(x.shape[-1], (1, 1), kernel_init=HE, name="excite")(y))


def conv_norm_rules(conv: str, norm: str, target: str) -> tuple[Rule, ...]:
    """From a convolution and a normalisation in PyTorch to a `ConvNorm`."""
    return Rule(f"{conv}.weight", f"params/{target}/conv/kernel", layout.CONV), *norm_rules(norm, f"{target}/bn")
