"""The residual networks of CIFAR: three stages of plain blocks, with and without parameters in their shortcuts."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxkd import layout
from jaxkd.models.convolution import Conv
from jaxkd.models.layers import BatchNorm, check_images, dense_rules, norm_rules
from jaxkd.models.model import Outputs
from jaxkd.transfer import Rule


class CifarResNet(nn.Module):
    """Residual network of 6 · `blocks` + 2 layers: a 3×3 convolution, three stages of blocks, mean, classifier.

    A block is `relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))`. The second and third stage halve the image. Where the
    shape changes, the shortcut takes every second pixel and pads the channels with zeros (option A of the paper), or
    projects by a 1×1 convolution and batch normalisation (option B).

    The kernels start as He et al. propose, by fan-in without and by fan-out with projections, as in the PyTorch code
    whose checkpoints `torch_rules` reads; the classifier starts as Flax's.

    Attributes:
        blocks: Blocks in each stage.
        widths: Channels of the first convolution and of each stage.
        projection: Option B.
        num_classes: Number of logits.

    References:
        He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385
    """

    blocks: int
    widths: Sequence[int] = (16, 16, 32, 64)
    projection: bool = False
    num_classes: int = 10

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Classifies images.

        Args:
            inputs: Floating-point images `[B, H, W, C]`, at least 4×4.
            train: Whether to normalise by the batch's statistics and to move the running ones.

        Returns:
            Logits `[B, num_classes]`; features after ReLU: `stem` `[B, H, W, widths[0]]`, `stage1` … `stage3`
            `[B, h, w, widths[i]]`, and `pre_logits`, their mean over the image, `[B, widths[3]]`.

        Raises:
            ValueError: If the shape is none of images, they are too small, or the weights take other channels; or if
                the widths shrink without projections.
            TypeError: If the images are not floating-point.
        """
        if not self.projection and list(self.widths) != sorted(self.widths):
            raise ValueError(f"widths {tuple(self.widths)} must not shrink, unless the shortcuts have projection=True")
        check_images(inputs, self.get_variable("params", "stem_conv"), least=4)
        init = nn.initializers.variance_scaling(2.0, "fan_out" if self.projection else "fan_in", "normal")
        x = Conv(self.widths[0], (3, 3), padding=1, use_bias=False, kernel_init=init, name="stem_conv")(inputs)
        x = nn.relu(BatchNorm(use_running_average=not train, name="stem_bn")(x))
        named = {"stem": x}
        for i, width in enumerate(self.widths[1:], start=1):
            for j in range(self.blocks):
                stride = 2 if i > 1 and j == 0 else 1
                x = _Block(width, stride, self.projection, init, name=f"stage{i}_block{j}")(x, train)
            named[f"stage{i}"] = x
        x = named["pre_logits"] = x.mean(axis=(1, 2))
        return Outputs(nn.Dense(self.num_classes, name="logits")(x), named)

    def torch_rules(self) -> tuple[Rule, ...]:
        """How PyTorch's weights become this module's.

        Returns:
            Rules for the names of akamaster/pytorch_resnet_cifar10, or with projections of HobbitLong/RepDistiller.
        """
        block, ours = "layer{i}.{j}", "stage{i}_block{j}"
        projection = (
            Rule(f"{block}.downsample.0.weight", f"params/{ours}/shortcut_conv/kernel", layout.CONV),
            *norm_rules(f"{block}.downsample.1", f"{ours}/shortcut_bn"),
        )
        return (
            Rule("conv1.weight", "params/stem_conv/kernel", layout.CONV),
            *norm_rules("bn1", "stem_bn"),
            Rule(f"{block}.conv{{k}}.weight", f"params/{ours}/conv{{k}}/kernel", layout.CONV),
            *norm_rules(f"{block}.bn{{k}}", f"{ours}/bn{{k}}"),
            *(projection if self.projection else ()),
            *dense_rules("fc" if self.projection else "linear", "logits"),
        )


def resnet20(num_classes: int = 10) -> CifarResNet:
    """ResNet-20 with shortcuts that have no parameters; 269,722 parameters at 10 classes.

    Args:
        num_classes: Number of logits.

    Returns:
        The module, for `from_linen`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import from_linen
        >>> model = from_linen(resnet20())
        >>> images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        269722
    """
    return CifarResNet(3, num_classes=num_classes)


def resnet32(num_classes: int = 10) -> CifarResNet:
    """ResNet-32, otherwise as `resnet20`; 464,154 parameters at 10 classes."""
    return CifarResNet(5, num_classes=num_classes)


def resnet44(num_classes: int = 10) -> CifarResNet:
    """ResNet-44, otherwise as `resnet20`; 658,586 parameters at 10 classes."""
    return CifarResNet(7, num_classes=num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """ResNet-56, otherwise as `resnet20`; 853,018 parameters at 10 classes."""
    return CifarResNet(9, num_classes=num_classes)


def resnet110(num_classes: int = 10) -> CifarResNet:
    """ResNet-110, otherwise as `resnet20`; 1,727,962 parameters at 10 classes."""
    return CifarResNet(18, num_classes=num_classes)


def resnet8x4(num_classes: int = 10) -> CifarResNet:
    """ResNet-8 of widths 32, 64, 128, 256 with projections; 1,233,540 parameters at 100 classes.

    Args:
        num_classes: Number of logits.

    Returns:
        The module, for `from_linen`.

    References:
        Tian et al., "Contrastive Representation Distillation", https://arxiv.org/abs/1910.10699
    """
    return CifarResNet(1, (32, 64, 128, 256), projection=True, num_classes=num_classes)


def resnet32x4(num_classes: int = 10) -> CifarResNet:
    """ResNet-32, otherwise as `resnet8x4`; 7,433,860 parameters at 100 classes."""
    return CifarResNet(5, (32, 64, 128, 256), projection=True, num_classes=num_classes)


class _Block(nn.Module):
    width: int
    stride: int
    projection: bool
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv = functools.partial(Conv, self.width, use_bias=False, kernel_init=self.kernel_init)
        norm = functools.partial(BatchNorm, use_running_average=not train)
        y = conv((3, 3), self.stride, padding=1, name="conv1")(x)
        y = conv((3, 3), padding=1, name="conv2")(nn.relu(norm(name="bn1")(y)))
        y = norm(name="bn2")(y)
        if y.shape == x.shape:
            shortcut = x
        elif self.projection:
            shortcut = norm(name="shortcut_bn")(conv((1, 1), self.stride, name="shortcut_conv")(x))
        else:
            shortcut = _subsample(x, self.stride, self.width)
        return nn.relu(y + shortcut)


def _subsample(x: Array, stride: int, width: int) -> Array:
    """Every `stride`-th pixel, between as many channels of zeros as are missing."""
    missing = width - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


# --- what the convolutional networks share ---
