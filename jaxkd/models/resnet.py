"""Residual networks for ImageNet, with the architecture of torchvision's."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from jaxkd import layout
from jaxkd.models.convolution import Conv
from jaxkd.models.layers import BatchNorm, batch_norm_rules, call_block, check_images, dense_rules
from jaxkd.models.model import Outputs
from jaxkd.transfer import Rule

HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He's initialisation of convolutions by fan-out."""


def resnet18(num_classes: int = 1000, *, remat: bool = False) -> "ResNet":
    """ResNet-18, 11,689,512 parameters with 1,000 classes; see `ResNet`."""
    return ResNet((2, 2, 2, 2), bottleneck=False, num_classes=num_classes, remat=remat)


def resnet34(num_classes: int = 1000, *, remat: bool = False) -> "ResNet":
    """ResNet-34, 21,797,672 parameters with 1,000 classes; see `ResNet`."""
    return ResNet((3, 4, 6, 3), bottleneck=False, num_classes=num_classes, remat=remat)


def resnet50(num_classes: int = 1000, *, remat: bool = False) -> "ResNet":
    """ResNet-50, 25,557,032 parameters with 1,000 classes; see `ResNet`."""
    return ResNet((3, 4, 6, 3), bottleneck=True, num_classes=num_classes, remat=remat)


def resnet101(num_classes: int = 1000, *, remat: bool = False) -> "ResNet":
    """ResNet-101, 44,549,160 parameters with 1,000 classes; see `ResNet`."""
    return ResNet((3, 4, 23, 3), bottleneck=True, num_classes=num_classes, remat=remat)


class ResNet(nn.Module):
    """Residual network of basic or bottleneck blocks.

    It has a 7×7 convolution with max-pooling, stages of blocks, the mean over the image and a dense
    layer. A bottleneck has its stride in the 3×3 convolution, as torchvision's ("version 1.5"); the
    paper has it in the first 1×1 convolution. Shortcuts that change the shape are 1×1 convolutions.

    Convolutions are initialised as He et al. propose, by fan-out. The scale of a block's last
    normalisation is initialised to one, not zero.

    Attributes:
        stage_sizes: Number of blocks of each stage; each stage after the first halves the image.
        bottleneck: Blocks are 1×1, 3×3, 1×1 convolutions, the last with four times the channels,
            instead of 3×3, 3×3.
        width: Channels of the stem and the first stage; they double from stage to stage.
        num_classes: Number of logits.
        remat: If true, training stores no values within blocks and computes them again for the
            gradient: a second forward pass, less memory, the same variables and results.

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
    remat: bool = False

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Classifies images.

        Args:
            inputs: Floating-point images `[B, H, W, C]`, of any size. The last stage works at 1/32
                of their height and width.
            train: If true, normalises by the statistics of the batch and updates the running ones.

        Returns:
            Logits `[B, num_classes]`; features `stem` (after the max-pooling), `stage1` … (after
            each stage and its ReLU) `[B, h, w, channels]`, and `pre_logits` (the mean of the last
            stage over the image) `[B, channels]`.

        Raises:
            ValueError: If the images are not `[B, H, W, C]`, are empty, or have other channels than
                the weights.
            TypeError: If the images are not floating-point.
        """
        check_images(inputs, self.get_variable("params", "stem_conv"), min_size=1)
        # padding=3 as in PyTorch: "SAME" would pad an even image by 2 and 3.
        stem_conv = Conv(
            self.width,
            (7, 7),
            2,
            padding=3,
            use_bias=False,
            kernel_init=HE_FAN_OUT,
            name="stem_conv",
        )
        x = stem_conv(inputs)
        x = nn.relu(BatchNorm(use_running_average=not train, name="stem_bn")(x))
        x = overlapping_max_pool(x)
        features = {"stem": x}
        for i, size in enumerate(self.stage_sizes, start=1):
            for j in range(size):
                stride = 2 if i > 1 and j == 0 else 1
                block = ResidualBlock(
                    self.width << (i - 1), stride, self.bottleneck, name=f"stage{i}_block{j}"
                )
                x = call_block(block, x, train=train, remat=self.remat and train)
            features[f"stage{i}"] = x
        x = features["pre_logits"] = x.mean((1, 2))
        logits = nn.Dense(self.num_classes, kernel_init=TORCH_UNIFORM, name="logits")(x)
        return Outputs(logits, features)

    def torch_rules(self) -> tuple[Rule, ...]:
        """Makes the rules from torchvision's names to this module's variables."""
        source = "layer{i}.{j}"
        target = "stage{i}_block{j}"
        return (
            Rule("conv1.weight", "params/stem_conv/kernel", layout.CONV),
            *batch_norm_rules("bn1", "stem_bn"),
            # {k} is 1 to 3 in bottlenecks, 1 and 2 in basic blocks.
            Rule(f"{source}.conv{{k}}.weight", f"params/{target}/conv{{k}}/kernel", layout.CONV),
            *batch_norm_rules(f"{source}.bn{{k}}", f"{target}/bn{{k}}"),
            Rule(
                f"{source}.downsample.0.weight",
                f"params/{target}/shortcut_conv/kernel",
                layout.CONV,
            ),
            *batch_norm_rules(f"{source}.downsample.1", f"{target}/shortcut_bn"),
            *dense_rules("fc", "logits"),
        )


TORCH_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform in ±1/√fan-in, as PyTorch's dense layers."""


class ResidualBlock(nn.Module):
    """Block `relu(x + f(x))`, with f of two normalised convolutions, or three in a bottleneck.

    Attributes:
        channels: Output channels of the 3×3 convolutions.
        stride: Stride of the first 3×3 convolution and of the shortcut.
        bottleneck: Puts a single 3×3 convolution between two of 1×1, the last with four times the
            channels.
    """

    channels: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps `[B, H, W, C]` to `[B, H / stride, W / stride, C']`."""
        layers = self._layers()
        y = x
        for k, layer in enumerate(layers, start=1):
            y = self._convolve(y, *layer, f"conv{k}", f"bn{k}", train)
            # The last activation follows the sum.
            y = nn.relu(y) if k < len(layers) else y
        channels = y.shape[-1]
        if self.stride > 1 or x.shape[-1] != channels:
            x = self._convolve(x, channels, 1, self.stride, "shortcut_conv", "shortcut_bn", train)
        return nn.relu(x + y)

    def _layers(self) -> tuple[tuple[int, int, int], ...]:
        """Returns channels, kernel size and stride of each convolution."""
        if self.bottleneck:
            return (self.channels, 1, 1), (self.channels, 3, self.stride), (4 * self.channels, 1, 1)
        return (self.channels, 3, self.stride), (self.channels, 3, 1)

    def _convolve(
        self, x: Array, channels: int, size: int, stride: int, conv: str, norm: str, train: bool
    ) -> Array:
        x = Conv(
            channels,
            (size,) * 2,
            stride,
            padding=size // 2,
            use_bias=False,
            kernel_init=HE_FAN_OUT,
            name=conv,
        )(x)
        return BatchNorm(use_running_average=not train, name=norm)(x)


def overlapping_max_pool(x: Array) -> Array:
    """Applies 3×3 max-pooling with stride 2 and padding of one pixel that is never the maximum.

    Equal in value to `flax.linen.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))`,
    computed as the maximum of slices along each axis. The gradient of this form needs no
    select-and-scatter, which is five times slower on a CPU and does not compile where a GPU must be
    deterministic. Equal maxima share the gradient; after a ReLU they are 0 and pass no gradient.

    Args:
        x: `[B, H, W, C]`.

    Returns:
        `[B, ⌈H / 2⌉, ⌈W / 2⌉, C]`.
    """
    # The maximum over a square is separable: 3 + 3 slices instead of 9.
    for axis in (1, 2):
        num_windows = (x.shape[axis] + 1) // 2
        padding = [(1, 1) if i == axis else (0, 0) for i in range(4)]
        # −inf, since with 0 the padding would be the maximum of negative values.
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        left, middle, right = (
            lax.slice_in_dim(padded, k, k + 2 * num_windows - 1, 2, axis) for k in range(3)
        )
        x = jnp.maximum(jnp.maximum(left, middle), right)
    return x
