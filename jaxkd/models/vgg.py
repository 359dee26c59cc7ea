"""VGG networks for CIFAR: plain blocks of normalised convolutions, and one dense layer."""

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from jaxkd import layout
from jaxkd.models.cnn import max_pool
from jaxkd.models.convolution import Conv
from jaxkd.models.layers import BatchNorm, batch_norm_rules, check_images, dense_rules
from jaxkd.models.model import Outputs
from jaxkd.transfer import Rule


class VGG(nn.Module):
    """Blocks of 3×3 convolutions with batch normalisation and ReLU, then the mean and a classifier.

    2×2 max-pooling follows the first three blocks, and the fourth too if the images are at least
    64×64. The distillation literature trains this form on CIFAR: the paper's dense layers are left
    out.

    The kernels are initialised as He et al. propose, by fan-out, as in the PyTorch code whose
    checkpoints `torch_rules` reads. The classifier has Flax's default initialisation.

    Attributes:
        widths: Output channels of each convolution of each of the five blocks.
        num_classes: Number of logits.

    References:
        Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
        Recognition", https://arxiv.org/abs/1409.1556
        Tian et al., "Contrastive Representation Distillation", https://arxiv.org/abs/1910.10699
    """

    widths: Sequence[Sequence[int]]
    num_classes: int = 10

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Classifies images.

        Args:
            inputs: Floating-point images `[B, H, W, C]`, at least 8×8.
            train: If true, normalises by the statistics of the batch and updates the running ones.

        Returns:
            Logits `[B, num_classes]`; features after ReLU and before pooling: `stem`, the first
            block, `[B, H, W, 64]`, and `stage1` … `stage4`, the other blocks,
            `[B, h, w, widths[i][-1]]`, numbered as the literature's hint layers; and `pre_logits`,
            the mean over the image, `[B, 512]`.

        Raises:
            ValueError: If the images are not `[B, H, W, C]`, are too small, or have other channels
                than the weights.
            TypeError: If the images are not floating-point.
        """
        check_images(inputs, self.get_variable("params", "block0_conv0"), min_size=8)
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        num_pooled = 4 if min(inputs.shape[1:3]) >= 64 else 3
        x = inputs
        features = {}
        for i, widths in enumerate(self.widths):
            # Pooling begins a block instead of ending one, so that hint layers are before it.
            x = max_pool(x) if 0 < i <= num_pooled else x
            for j, width in enumerate(widths):
                x = Conv(width, (3, 3), padding=1, kernel_init=init, name=f"block{i}_conv{j}")(x)
                x = nn.relu(BatchNorm(use_running_average=not train, name=f"block{i}_bn{j}")(x))
            features[f"stage{i}" if i else "stem"] = x
        x = features["pre_logits"] = x.mean(axis=(1, 2))
        return Outputs(nn.Dense(self.num_classes, name="logits")(x), features)

    def torch_rules(self) -> tuple[Rule, ...]:
        """Makes the rules from the names of PyTorch's weights to this module's variables.

        Returns:
            Rules for the names of HobbitLong/RepDistiller, where convolution j of a block is layer
            3 j.
        """
        rules = []
        for j in range(max(map(len, self.widths))):
            # A block of PyTorch repeats convolution, normalisation, ReLU.
            rules += dense_rules(f"block{{i}}.{3 * j}", f"block{{i}}_conv{j}", layout.CONV)
            rules += batch_norm_rules(f"block{{i}}.{3 * j + 1}", f"block{{i}}_bn{j}")
        return *rules, *dense_rules("classifier", "logits")


def vgg8(num_classes: int = 10) -> VGG:
    """VGG-8 with batch normalisation; 3,965,028 parameters at 100 classes.

    Args:
        num_classes: Number of logits.

    Returns:
        The module, for `from_linen`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import from_linen
        >>> model = from_linen(vgg8(num_classes=100))
        >>> images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        3965028
    """
    return VGG(((64,), (128,), (256,), (512,), (512,)), num_classes)


def vgg13(num_classes: int = 10) -> VGG:
    """VGG-13, two convolutions a block, else as `vgg8`; 9,462,180 parameters at 100 classes."""
    return VGG(((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)), num_classes)
