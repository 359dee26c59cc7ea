"""Wide residual networks: blocks that normalise and activate before they convolve."""

import functools

import flax.linen as nn
from jax import Array

from jaxkd import layout
from jaxkd.models.convolution import Conv
from jaxkd.models.layers import BatchNorm, batch_norm_rules, call_block, check_images, dense_rules
from jaxkd.models.model import Outputs
from jaxkd.transfer import Rule

_conv = functools.partial(
    Conv, use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal")
)


class WideResNet(nn.Module):
    """Wide residual network of 6 · `blocks` + 4 layers for small images.

    It has a 3×3 convolution, three stages of blocks, the mean over the image and a classifier. A
    block is `x + conv(dropout(relu(bn(conv(relu(bn(x)))))))`. The second and third stage halve the
    image. Where the channels change, a 1×1 convolution of `relu(bn(x))` replaces `x`.

    The kernels are initialised as He et al. propose, by fan-out, as in the PyTorch code whose
    checkpoints `torch_rules` reads. The classifier has Flax's default initialisation.

    Attributes:
        blocks: Number of blocks of each stage.
        widen: Factor of the widths 16, 32 and 64.
        dropout: Probability of dropping a value between the two convolutions of a block.
        num_classes: Number of logits.
        remat: If true, training stores no values within blocks and computes them again for the
            gradient: a second forward pass, less memory, the same variables and results.

    References:
        Zagoruyko and Komodakis, "Wide Residual Networks", https://arxiv.org/abs/1605.07146
    """

    blocks: int
    widen: int
    dropout: float = 0.0
    num_classes: int = 10
    remat: bool = False

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Classifies images.

        Args:
            inputs: Floating-point images `[B, H, W, C]`, at least 4×4.
            train: If true, applies dropout, normalises by the statistics of the batch and updates
                the running ones.

        Returns:
            Logits `[B, num_classes]`; features `stem` `[B, H, W, 16]`, the first convolution, and
            `stage1` … `stage3` `[B, h, w, widths[i]]`, the sums, all of them before the
            normalisation and ReLU with which the next block begins; `pre_logits`, the mean after
            the last ReLU, `[B, widths[3]]`.

        Raises:
            ValueError: If the images are not `[B, H, W, C]`, are too small, or have other channels
                than the weights.
            TypeError: If the images are not floating-point.
        """
        check_images(inputs, self.get_variable("params", "stem_conv"), min_size=4)
        x = _conv(16, (3, 3), padding=1, name="stem_conv")(inputs)
        features = {"stem": x}
        for i, width in enumerate((16, 32, 64), start=1):
            for j in range(self.blocks):
                stride = 2 if i > 1 and j == 0 else 1
                block = _PreActivationBlock(
                    width * self.widen, stride, self.dropout, name=f"stage{i}_block{j}"
                )
                x = call_block(block, x, train=train, remat=self.remat and train)
            features[f"stage{i}"] = x
        # The blocks leave the activation of their sum to the next block.
        x = nn.relu(BatchNorm(use_running_average=not train, name="last_bn")(x))
        x = features["pre_logits"] = x.mean(axis=(1, 2))
        return Outputs(nn.Dense(self.num_classes, name="logits")(x), features)

    def torch_rules(self) -> tuple[Rule, ...]:
        """Makes the rules from the names of PyTorch's weights to this module's variables.

        Returns:
            Rules for the names of HobbitLong/RepDistiller.
        """
        source = "block{i}.layer.{j}"
        target = "stage{i}_block{j}"
        return (
            Rule("conv1.weight", "params/stem_conv/kernel", layout.CONV),
            Rule(
                f"{source}.convShortcut.weight",
                f"params/{target}/shortcut_conv/kernel",
                layout.CONV,
            ),
            Rule(f"{source}.conv{{k}}.weight", f"params/{target}/conv{{k}}/kernel", layout.CONV),
            *batch_norm_rules(f"{source}.bn{{k}}", f"{target}/bn{{k}}"),
            *batch_norm_rules("bn1", "last_bn"),
            *dense_rules("fc", "logits"),
        )


def wrn16_2(num_classes: int = 10, *, dropout: float = 0.0, remat: bool = False) -> WideResNet:
    """WRN-16-2; 703,284 parameters at 100 classes.

    Args:
        num_classes: Number of logits.
        dropout: Probability of dropping a value within a block.
        remat: As in `WideResNet`.

    Returns:
        The module, for `from_linen`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import from_linen
        >>> model = from_linen(wrn16_2(num_classes=100))
        >>> images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        703284
    """
    return WideResNet(2, 2, dropout, num_classes, remat)


def wrn40_2(num_classes: int = 10, *, dropout: float = 0.0, remat: bool = False) -> WideResNet:
    """WRN-40-2, otherwise as `wrn16_2`; 2,255,156 parameters at 100 classes."""
    return WideResNet(6, 2, dropout, num_classes, remat)


class _PreActivationBlock(nn.Module):
    width: int
    stride: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        norm = functools.partial(BatchNorm, use_running_average=not train)
        active = nn.relu(norm(name="bn1")(x))
        # padding=1 as in PyTorch: with stride 2, "SAME" would pad an even image only at its end.
        y = _conv(self.width, (3, 3), self.stride, padding=1, name="conv1")(active)
        y = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(norm(name="bn2")(y)))
        y = _conv(self.width, (3, 3), padding=1, name="conv2")(y)
        # The shortcut is projected from the activated input, as in the PyTorch code.
        if x.shape[-1] != self.width:
            x = _conv(self.width, (1, 1), self.stride, name="shortcut_conv")(active)
        return x + y
