"""CIFAR's networks in PyTorch, named as the public checkpoints, and a comparison with them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.models import from_linen
from jaxkd.transfer import transfer

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
nn, F = torch.nn, torch.nn.functional


def assert_equal(module, reference, *, size=32):
    """Checks that equal random weights give equal outputs, statistics and gradients.

    Training is compared in float64. In float32, a unit within rounding errors of zero may pass a
    gradient in one network and none in the other, and in a deep network the second digit differs.
    """
    randomize(reference)
    images = np.random.default_rng(1).normal(size=(4, size, size, 3)).astype(np.float32)
    model = from_linen(module)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables, report = transfer(state(reference), shapes, rules=module.torch_rules())
    assert report.complete
    outputs, batch_stats = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    chex.assert_trees_all_equal(batch_stats, variables["batch_stats"])
    with torch.no_grad():
        expected = reference.eval()(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    assert_close({"logits": outputs.logits}, {"logits": expected}, 1e-5)

    # Flax's normalisation promotes its input with float32, which strict promotion forbids for
    # float64.
    x64 = jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()
    with x64, jax.numpy_dtype_promotion("standard"):
        variables, images = jax.tree.map(np.float64, (variables, images))
        assert_close(
            training(model, variables, images),
            torch_training(reference, images, shapes, module.torch_rules()),
            1e-8,
        )


def training(model, variables, images):
    """Returns the logits, updated statistics and gradients of the sum of the squared logits."""

    def objective(params):
        outputs, batch_stats = model.apply({**variables, "params": params}, images, train=True)
        return (outputs.logits**2).sum(), (outputs.logits, batch_stats)

    (_, (logits, batch_stats)), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        variables["params"]
    )
    return {"logits": logits, "batch_stats": batch_stats, "params": gradients}


def torch_training(reference, images, shapes, rules):
    """Returns the same as `training`, computed by PyTorch."""
    logits = reference.double().train()(torch.tensor(images.transpose(0, 3, 1, 2)))
    (logits**2).sum().backward()
    arrays = {name: array for name, array in state(reference).items() if "running" in name}
    arrays |= {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    return {
        "logits": logits.detach().numpy(),
        **transfer(arrays, shapes, rules=rules, dtypes="source")[0],
    }


def assert_close(actual, expected, tolerance):
    """Compares relative to the largest entry of an array, or of a layer.

    A bias before a normalisation has a gradient of 0, so that only rounding errors remain.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, jax.tree.map(jnp.asarray, expected))
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(actual, is_layer),
        jax.tree.leaves(expected, is_leaf=is_layer),
        strict=True,
    )
    for (path, ours), theirs in pairs:
        errors = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), ours, theirs))
        largest = max(np.abs(array).max() for array in jax.tree.leaves(theirs))
        assert max(errors) < tolerance * largest, (jax.tree_util.keystr(path), max(errors), largest)


def is_layer(tree):
    return isinstance(tree, dict) and "kernel" in tree


def randomize(reference):
    """Draws weights and running statistics, none at its default, that keep activations near one."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in reference.state_dict().items():
        if tensor.ndim > 1:
            tensor.copy_(
                torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
            )
        elif tensor.is_floating_point():
            low, high = (-0.5, 0.5) if name.endswith(("bias", "mean")) else (0.5, 1.5)
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)


def state(reference):
    return {name: tensor.detach().numpy().copy() for name, tensor in reference.state_dict().items()}


def conv3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """Basic block, with `projection` of option B, a module `downsample`, else of option A."""

    def __init__(self, inputs, outputs, stride, projection):
        super().__init__()
        self.conv1, self.bn1 = conv3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride, self.extra, self.downsample = stride, outputs - inputs, None
        if projection and (stride > 1 or inputs != outputs):
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            return F.relu(y + self.downsample(x))
        half = self.extra // 2
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half)))


class ResNet(nn.Module):
    def __init__(self, blocks, widths, projection, num_classes):
        super().__init__()
        self.conv1, self.bn1 = conv3(3, widths[0]), nn.BatchNorm2d(widths[0])
        for i in (1, 2, 3):
            in_channels = [widths[i - 1]] + [widths[i]] * (blocks - 1)
            strides = [2 if i > 1 else 1] + [1] * (blocks - 1)
            layer = [
                ResidualBlock(channels, widths[i], stride, projection)
                for channels, stride in zip(in_channels, strides, strict=True)
            ]
            setattr(self, f"layer{i}", nn.Sequential(*layer))
        self.classifier = "fc" if projection else "linear"
        setattr(self, self.classifier, nn.Linear(widths[3], num_classes))

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return getattr(self, self.classifier)(x.mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, dropout):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3(outputs, outputs)
        self.convShortcut = (
            None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        active = F.relu(self.bn1(x))
        y = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(nn.Module):
    def __init__(self, blocks, widen, num_classes, dropout=0.0):
        super().__init__()
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = conv3(3, widths[0])
        for i in (1, 2, 3):
            in_channels = [widths[i - 1]] + [widths[i]] * (blocks - 1)
            strides = [2 if i > 1 else 1] + [1] * (blocks - 1)
            layer = [
                WideBlock(channels, widths[i], stride, dropout)
                for channels, stride in zip(in_channels, strides, strict=True)
            ]
            block = nn.Module()
            block.layer = nn.Sequential(*layer)
            setattr(self, f"block{i}", block)
        self.bn1, self.fc = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], num_classes)

    def forward(self, x):
        x = self.block3.layer(self.block2.layer(self.block1.layer(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class VGG(nn.Module):
    def __init__(self, widths, num_classes):
        super().__init__()
        in_channels = 3
        for i, block in enumerate(widths):
            layers = []
            for width in block:
                layers += [
                    nn.Conv2d(in_channels, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                in_channels = width
            setattr(self, f"block{i}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, x):
        fourth = (lambda x: F.max_pool2d(x, 2)) if x.shape[2] == 64 else (lambda x: x)
        x = F.relu(self.block0(x))
        x = F.relu(self.block1(F.max_pool2d(x, 2)))
        x = F.relu(self.block2(F.max_pool2d(x, 2)))
        x = F.relu(self.block3(F.max_pool2d(x, 2)))
        return self.classifier(F.relu(self.block4(fourth(x))).mean((2, 3)))


class PlainCNN(nn.Module):
    def __init__(self, stages, hidden, num_classes, size=32):
        super().__init__()
        layers, in_channels = [], 3
        for stage in stages:
            for width in stage:
                layers += [
                    nn.Conv2d(in_channels, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                in_channels = width
            layers.append(nn.MaxPool2d(2))
        flat = in_channels * (size >> len(stages)) ** 2
        dense = [nn.Linear(flat, hidden), nn.ReLU()] if hidden else []
        self.conv_layers = nn.Sequential(*layers)
        self.fc_layers = nn.Sequential(*dense, nn.Linear(hidden or flat, num_classes))

    def forward(self, x):
        return self.fc_layers(self.conv_layers(x).flatten(1))
