"""Residual networks for CIFAR: three stages of basic blocks, with shortcuts of option A or B."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxkd import layout
from jaxkd.models.convolution import Conv
from jaxkd.models.layers import BatchNorm, batch_norm_rules, call_block, check_images, dense_rules
from jaxkd.models.model import Outputs
from jaxkd.transfer import Rule


class CifarResNet(nn.Module):
    """Residual network of 6 · `blocks` + 2 layers for small images.

    It has a 3×3 convolution, three stages of blocks, the mean over the image and a classifier. A
    block is `relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))`. The second and third stage halve the
    image. Where the shape changes, the shortcut either takes every second pixel and pads the
    channels with zeros (option A of the paper), or is a 1×1 convolution with batch normalisation
    (option B).

    The kernels are initialised as He et al. propose, by fan-in for option A and by fan-out for
    option B, as in the PyTorch code whose checkpoints `torch_rules` reads. The classifier has
    Flax's default initialisation.

    Attributes:
        blocks: Number of blocks of each stage.
        widths: Channels of the first convolution and of each stage.
        projection: Uses option B.
        num_classes: Number of logits.
        remat: If true, training stores no values within blocks and computes them again for the
            gradient: a second forward pass, less memory, the same variables and results.

    References:
        He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385
    """

    blocks: int
    widths: Sequence[int] = (16, 16, 32, 64)
    projection: bool = False
    num_classes: int = 10
    remat: bool = False

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Classifies images.

        Args:
            inputs: Floating-point images `[B, H, W, C]`, at least 4×4.
            train: If true, normalises by the statistics of the batch and updates the running ones.

        Returns:
            Logits `[B, num_classes]`; features after ReLU: `stem` `[B, H, W, widths[0]]`, `stage1`
            … `stage3` `[B, h, w, widths[i]]`, and `pre_logits`, their mean over the image,
            `[B, widths[3]]`.

        Raises:
            ValueError: If the images are not `[B, H, W, C]`, are too small, or have other channels
                than the weights; or if the widths shrink without projections.
            TypeError: If the images are not floating-point.
        """
        # Option A can only append channels.
        if not self.projection and list(self.widths) != sorted(self.widths):
            raise ValueError(
                f"widths {tuple(self.widths)} must not shrink from stage to stage, except with "
                "projection=True"
            )
        check_images(inputs, self.get_variable("params", "stem_conv"), min_size=4)
        init = nn.initializers.variance_scaling(
            2.0, "fan_out" if self.projection else "fan_in", "normal"
        )
        x = Conv(
            self.widths[0], (3, 3), padding=1, use_bias=False, kernel_init=init, name="stem_conv"
        )(inputs)
        x = nn.relu(BatchNorm(use_running_average=not train, name="stem_bn")(x))
        features = {"stem": x}
        for i, width in enumerate(self.widths[1:], start=1):
            for j in range(self.blocks):
                stride = 2 if i > 1 and j == 0 else 1
                block = _BasicBlock(width, stride, self.projection, init, name=f"stage{i}_block{j}")
                x = call_block(block, x, train=train, remat=self.remat and train)
            features[f"stage{i}"] = x
        x = features["pre_logits"] = x.mean(axis=(1, 2))
        return Outputs(nn.Dense(self.num_classes, name="logits")(x), features)

    def torch_rules(self) -> tuple[Rule, ...]:
        """Makes the rules from the names of PyTorch's weights to this module's variables.

        Returns:
            Rules for the names of akamaster/pytorch_resnet_cifar10 with option A, and of
            HobbitLong/RepDistiller with option B.
        """
        source = "layer{i}.{j}"
        target = "stage{i}_block{j}"
        # Option A has no weights: akamaster's shortcuts are a lambda.
        projection = (
            Rule(
                f"{source}.downsample.0.weight",
                f"params/{target}/shortcut_conv/kernel",
                layout.CONV,
            ),
            *batch_norm_rules(f"{source}.downsample.1", f"{target}/shortcut_bn"),
        )
        return (
            Rule("conv1.weight", "params/stem_conv/kernel", layout.CONV),
            *batch_norm_rules("bn1", "stem_bn"),
            Rule(f"{source}.conv{{k}}.weight", f"params/{target}/conv{{k}}/kernel", layout.CONV),
            *batch_norm_rules(f"{source}.bn{{k}}", f"{target}/bn{{k}}"),
            *(projection if self.projection else ()),
            *dense_rules("fc" if self.projection else "linear", "logits"),
        )


def resnet20(num_classes: int = 10, *, remat: bool = False) -> CifarResNet:
    """ResNet-20 with shortcuts that have no parameters; 269,722 parameters at 10 classes.

    Args:
        num_classes: Number of logits.
        remat: As in `CifarResNet`.

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
    return CifarResNet(3, num_classes=num_classes, remat=remat)


def resnet32(num_classes: int = 10, *, remat: bool = False) -> CifarResNet:
    """ResNet-32, otherwise as `resnet20`; 464,154 parameters at 10 classes."""
    return CifarResNet(5, num_classes=num_classes, remat=remat)


def resnet44(num_classes: int = 10, *, remat: bool = False) -> CifarResNet:
    """ResNet-44, otherwise as `resnet20`; 658,586 parameters at 10 classes."""
    return CifarResNet(7, num_classes=num_classes, remat=remat)


def resnet56(num_classes: int = 10, *, remat: bool = False) -> CifarResNet:
    """ResNet-56, otherwise as `resnet20`; 853,018 parameters at 10 classes."""
    return CifarResNet(9, num_classes=num_classes, remat=remat)


def resnet110(num_classes: int = 10, *, remat: bool = False) -> CifarResNet:
    """ResNet-110, otherwise as `resnet20`; 1,727,962 parameters at 10 classes."""
    return CifarResNet(18, num_classes=num_classes, remat=remat)


def resnet8x4(num_classes: int = 10, *, remat: bool = False) -> CifarResNet:
    """ResNet-8 of widths 32, 64, 128, 256 with projections; 1,233,540 parameters at 100 classes.

    Args:
        num_classes: Number of logits.
        remat: As in `CifarResNet`.

    Returns:
        The module, for `from_linen`.

    References:
        Tian et al., "Contrastive Representation Distillation", https://arxiv.org/abs/1910.10699
    """
    return CifarResNet(1, (32, 64, 128, 256), projection=True, num_classes=num_classes, remat=remat)


def resnet32x4(num_classes: int = 10, *, remat: bool = False) -> CifarResNet:
    """ResNet-32, otherwise as `resnet8x4`; 7,433,860 parameters at 100 classes."""
    return CifarResNet(5, (32, 64, 128, 256), projection=True, num_classes=num_classes, remat=remat)


class _BasicBlock(nn.Module):
    width: int
    stride: int
    projection: bool
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv = functools.partial(Conv, self.width, use_bias=False, kernel_init=self.kernel_init)
        norm = functools.partial(BatchNorm, use_running_average=not train)
        # padding=1 as in PyTorch: with stride 2, "SAME" would pad an even image only at its end.
        y = conv((3, 3), self.stride, padding=1, name="conv1")(x)
        y = conv((3, 3), padding=1, name="conv2")(nn.relu(norm(name="bn1")(y)))
        y = norm(name="bn2")(y)
        # Stage 1 keeps the shape as well, unless the stem is narrower, as in `resnet8x4`.
        if y.shape == x.shape:
            shortcut = x
        elif self.projection:
            shortcut = norm(name="shortcut_bn")(conv((1, 1), self.stride, name="shortcut_conv")(x))
        else:
            shortcut = _subsample_and_pad(x, self.stride, self.width)
        return nn.relu(y + shortcut)


def _subsample_and_pad(x: Array, stride: int, width: int) -> Array:
    """Takes every `stride`-th pixel and pads the channels to `width`, with zeros on both sides."""
    missing = width - x.shape[-1]
    channel_padding = (missing // 2, missing - missing // 2)
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), channel_padding))
