"""The residual networks of ImageNet, with the names and numbers of torchvision's."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from jaxkd import layout
from jaxkd.models.convolution import Conv
from jaxkd.models.layers import BatchNorm, check_images, dense_rules, norm_rules
from jaxkd.models.model import Outputs
from jaxkd.transfer import Rule

HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He's initialisation of convolutions, by fan-out."""


def resnet18(num_classes: int = 1000) -> "ResNet":
    """ResNet-18, 11,689,512 parameters with 1,000 classes; see `ResNet`."""
    return ResNet((2, 2, 2, 2), bottleneck=False, num_classes=num_classes)


def resnet34(num_classes: int = 1000) -> "ResNet":
    """ResNet-34, 21,797,672 parameters with 1,000 classes; see `ResNet`."""
    return ResNet((3, 4, 6, 3), bottleneck=False, num_classes=num_classes)


def resnet50(num_classes: int = 1000) -> "ResNet":
    """ResNet-50, 25,557,032 parameters with 1,000 classes; see `ResNet`."""
    return ResNet((3, 4, 6, 3), bottleneck=True, num_classes=num_classes)


def resnet101(num_classes: int = 1000) -> "ResNet":
    """ResNet-101, 44,549,160 parameters with 1,000 classes; see `ResNet`."""
    return ResNet((3, 4, 23, 3), bottleneck=True, num_classes=num_classes)


class ResNet(nn.Module):
    """A 7×7 convolution and a max-pooling, stages of residual blocks, the mean over the image, a dense layer.

    A bottleneck has its stride in the 3×3 convolution, as torchvision's ("version 1.5"); the paper has it in the first
    1×1. Shortcuts that change the shape are 1×1 convolutions. Convolutions start as He's, by fan-out, and the last
    normalisation of a block at one, not zero.

    Attributes:
        stage_sizes: Number of blocks of each stage; a stage after the first halves the image.
        bottleneck: Blocks are 1×1, 3×3, 1×1 with four times the channels at their ends, instead of 3×3, 3×3.
        width: Channels of the stem and of the first stage, which double from stage to stage.
        num_classes: Number of logits.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import from_linen
        >>> from jaxkd.models.resnet import resnet50
        >>> model = from_linen(resnet50(num_classes=10))
        >>> images = jnp.zeros((2, 224, 224, 3))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> variables["params"]["stage4_block2"]["conv3"]["kernel"].shape
        (1, 1, 512, 2048)

    References:
        He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385
    """

    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    bottleneck: bool = False
    width: int = 64
    num_classes: int = 1000

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Classifies images.

        Args:
            inputs: Floating-point images `[B, H, W, C]`, of any size; the last stage sees them 32 times smaller.
            train: Normalise by the batch's statistics and move the running ones.

        Returns:
            Logits `[B, num_classes]`; features `stem` (after the max-pooling), `stage1` … (after each stage and its
            ReLU) `[B, h, w, channels]`, and `pre_logits` (their mean over the image) `[B, channels]`.

        Raises:
            ValueError: If the images are not `[B, H, W, C]`, are empty, or have other channels than the weights.
            TypeError: If they are not floating-point.
        """
        check_images(inputs, self.get_variable("params", "stem_conv"), least=1)
        x = Conv(self.width, (7, 7), 2, padding=3, use_bias=False, kernel_init=HE, name="stem_conv")(inputs)
        x = nn.relu(BatchNorm(use_running_average=not train, name="stem_bn")(x))
        x = overlapping_max_pool(x)
        named = {"stem": x}
        for i, size in enumerate(self.stage_sizes, start=1):
            for j in range(size):
                stride = 2 if i > 1 and j == 0 else 1
                block = ResidualBlock(self.width << (i - 1), stride, self.bottleneck, name=f"stage{i}_block{j}")
                x = block(x, train)
            named[f"stage{i}"] = x
        x = named["pre_logits"] = x.mean((1, 2))
        return Outputs(nn.Dense(self.num_classes, kernel_init=UNIFORM, name="logits")(x), named)

    def torch_rules(self) -> tuple[Rule, ...]:
        """From the names of torchvision's ResNets to this module's variables."""
        block, ours = "layer{i}.{j}", "stage{i}_block{j}"
        return (
            Rule("conv1.weight", "params/stem_conv/kernel", layout.CONV),
            *norm_rules("bn1", "stem_bn"),
            Rule(f"{block}.conv{{k}}.weight", f"params/{ours}/conv{{k}}/kernel", layout.CONV),
            *norm_rules(f"{block}.bn{{k}}", f"{ours}/bn{{k}}"),
            Rule(f"{block}.downsample.0.weight", f"params/{ours}/shortcut_conv/kernel", layout.CONV),
            *norm_rules(f"{block}.downsample.1", f"{ours}/shortcut_bn"),
            *dense_rules("fc", "logits"),
        )


UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Between ±1 / √fan-in, as PyTorch's dense layers."""


class ResidualBlock(nn.Module):
    """`relu(x + f(x))`, where f is two convolutions, or three as a bottleneck, each with its normalisation.

    Attributes:
        channels: Output channels of the 3×3 convolutions.
        stride: Of the first 3×3 convolution and of the shortcut.
        bottleneck: Stands the 3×3 convolution between 1×1 ones, the last with four times the channels.
    """

    channels: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`[B, H, W, C]` to `[B, H / stride, W / stride, C']`."""
        *inner, (out, size, stride) = self._layers()
        y = x
        for k, layer in enumerate(inner, start=1):
            y = nn.relu(self._convolve(y, *layer, f"conv{k}", f"bn{k}", train))
        k = len(inner) + 1
        y = self._convolve(y, out, size, stride, f"conv{k}", f"bn{k}", train)
        if self.stride > 1 or x.shape[-1] != out:
            x = self._convolve(x, out, 1, self.stride, "shortcut_conv", "shortcut_bn", train)
        return nn.relu(x + y)

    def _layers(self) -> tuple[tuple[int, int, int], ...]:
        """Channels, kernel and stride of each convolution."""
        if self.bottleneck:
            return (self.channels, 1, 1), (self.channels, 3, self.stride), (4 * self.channels, 1, 1)
        return (self.channels, 3, self.stride), (self.channels, 3, 1)

    def _convolve(self, x: Array, channels: int, size: int, stride: int, conv: str, norm: str, train: bool) -> Array:
        x = Conv(channels, (size,) * 2, stride, padding=size // 2, use_bias=False, kernel_init=HE, name=conv)(x)
        return BatchNorm(use_running_average=not train, name=norm)(x)


def overlapping_max_pool(x: Array) -> Array:
    """3×3 max-pooling with stride 2, behind a border of one pixel that never wins.

    Equal in value to `flax.linen.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))`, as a maximum of slices
    along either axis: its gradient needs no select-and-scatter, which is five times slower on a CPU and does not
    compile where a GPU must be deterministic. Tied maxima share the gradient; behind a ReLU they are 0 and pass none.

    Args:
        x: `[B, H, W, C]`.

    Returns:
        `[B, ⌈H / 2⌉, ⌈W / 2⌉, C]`.
    """
    for axis in (1, 2):
        count = (x.shape[axis] + 1) // 2
        border = [(1, 1) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(x, border, constant_values=-jnp.inf)
        left, middle, right = (lax.slice_in_dim(padded, k, k + 2 * count - 1, 2, axis) for k in range(3))
        x = jnp.maximum(jnp.maximum(left, middle), right)
    return x
