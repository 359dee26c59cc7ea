"""ImageNet's networks in plain PyTorch, as functions of a state dict, compared with ours.

Each network is written from its paper, with the names of the weights in torchvision or in
EfficientNet-Lite's file. Its sizes come from our module. PyTorch is needed only to evaluate one.
"""

import functools
import importlib
import math
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np

from any_model import HAS_TORCH, variable_shapes
from jaxkd.models import from_linen
from jaxkd.transfer import leaves_by_path, rename_back, transfer

torch = importlib.import_module("torch") if HAS_TORCH else None
F = importlib.import_module("torch.nn.functional") if HAS_TORCH else None


class Network:
    """Layers of a network by name; in training, they update the running statistics in place."""

    def __init__(self, state, *, train, momentum=0.1, epsilon=1e-5, same=False):
        self.state = state
        self.train = train
        self.momentum = momentum
        self.epsilon = epsilon
        self.same = same

    def conv(self, x, name, stride=1, groups=1):
        weight = self.state[f"{name}.weight"]
        size = weight.shape[-1]
        if self.same:
            missing = [
                max((math.ceil(n / stride) - 1) * stride + size - n, 0)
                for n in (x.shape[3], x.shape[2])
            ]
            x = F.pad(x, [part for n in missing for part in (n // 2, n - n // 2)])
        padding = 0 if self.same else size // 2
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, padding, groups=groups)

    def norm(self, x, name):
        mean, var, scale, bias = (
            self.state[f"{name}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, scale, bias, self.train, self.momentum, self.epsilon)

    def dense(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])


def resnet(module, state, x, train):
    net = Network(state, train=train)
    x = F.max_pool2d(F.relu(net.norm(net.conv(x, "conv1", 2), "bn1")), 3, 2, 1)
    for i, size in enumerate(module.stage_sizes, start=1):
        for j in range(size):
            name, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            strides = (1, stride, 1) if module.bottleneck else (stride, 1)
            y = x
            for k, step in enumerate(strides, start=1):
                y = net.norm(net.conv(y, f"{name}.conv{k}", step), f"{name}.bn{k}")
                y = F.relu(y) if k < len(strides) else y
            if f"{name}.downsample.0.weight" in state:
                x = net.norm(net.conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = F.relu(x + y)
    return net.dense(x.mean((2, 3)), "fc")


def mobilenet(module, state, x, train):
    net = Network(state, train=train)
    x, n = F.relu6(net.norm(net.conv(x, "features.0.0", 2), "features.0.1")), 0
    for expansion, channels, blocks, first_stride, _ in module.stages:
        for stride in (first_stride, *[1] * (blocks - 1)):
            n, y, k = n + 1, x, 0
            name = f"features.{n}.conv"
            if expansion > 1:
                y, k = F.relu6(net.norm(net.conv(y, f"{name}.0.0"), f"{name}.0.1")), 1
            y = F.relu6(net.norm(net.conv(y, f"{name}.{k}.0", stride, y.shape[1]), f"{name}.{k}.1"))
            y = net.norm(net.conv(y, f"{name}.{k + 1}"), f"{name}.{k + 2}")
            x = x + y if stride == 1 and x.shape[1] == channels else y
    x = F.relu6(net.norm(net.conv(x, f"features.{n + 1}.0"), f"features.{n + 1}.1"))
    return net.dense(x.mean((2, 3)), "classifier.1")


def efficientnet(module, state, x, train):
    config = module.config
    net = Network(state, train=train, momentum=1 - config.momentum, epsilon=config.epsilon)
    x = F.silu(net.norm(net.conv(x, "features.0.0", 2), "features.0.1"))
    for i, (expansion, channels, blocks, first_stride, _) in enumerate(module.stages, start=1):
        for j, stride in enumerate((first_stride, *[1] * (blocks - 1))):
            y, k = x, 0
            name = f"features.{i}.{j}.block"
            if expansion > 1:
                y, k = F.silu(net.norm(net.conv(y, f"{name}.0.0"), f"{name}.0.1")), 1
            y = F.silu(net.norm(net.conv(y, f"{name}.{k}.0", stride, y.shape[1]), f"{name}.{k}.1"))
            weight = F.silu(net.conv(y.mean((2, 3), keepdim=True), f"{name}.{k + 1}.fc1"))
            y = y * torch.sigmoid(net.conv(weight, f"{name}.{k + 1}.fc2"))
            y = net.norm(net.conv(y, f"{name}.{k + 2}.0"), f"{name}.{k + 2}.1")
            x = x + y if stride == 1 and x.shape[1] == channels else y
    last = f"features.{len(module.stages) + 1}"
    return net.dense(
        F.silu(net.norm(net.conv(x, f"{last}.0"), f"{last}.1")).mean((2, 3)), "classifier.1"
    )


def efficientnet_lite(module, state, x, train):
    net = Network(state, train=train, momentum=0.01, epsilon=1e-3, same=True)
    x, n = F.relu6(net.norm(net.conv(x, "_conv_stem", 2), "_bn0")), 0
    for expansion, channels, blocks, first_stride, _ in module.stages:
        for stride in (first_stride, *[1] * (blocks - 1)):
            y, name, n = x, f"_blocks.{n}", n + 1
            if expansion > 1:
                y = F.relu6(net.norm(net.conv(y, f"{name}._expand_conv"), f"{name}._bn0"))
            y = F.relu6(
                net.norm(net.conv(y, f"{name}._depthwise_conv", stride, y.shape[1]), f"{name}._bn1")
            )
            y = net.norm(net.conv(y, f"{name}._project_conv"), f"{name}._bn2")
            x = x + y if stride == 1 and x.shape[1] == channels else y
    return net.dense(F.relu6(net.norm(net.conv(x, "_conv_head"), "_bn1")).mean((2, 3)), "_fc")


def draw(module):
    """Draws random variables that depend on their names in PyTorch, to be drawn there too."""
    tree = variable_shapes(module)
    rules = module.torch_rules()
    leaves = [
        _draw_array(rename_back(path, rules).path, leaf.shape)
        for path, leaf in leaves_by_path(tree).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _draw_array(name, shape):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    kind = name.rpartition(".")[2]
    if kind == "running_var" or (kind == "weight" and len(shape) == 1):
        return jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)
    scale = math.sqrt(2 / math.prod(shape[:-1])) if len(shape) > 1 else 0.2
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


def images(*shape):
    """Draws images, or other arrays."""
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def state_dict(module, tree):
    """Converts a tree of variables, or a part of it, to a state dict of PyTorch."""
    state = {}
    rules = module.torch_rules()
    for path, leaf in leaves_by_path(tree).items():
        name, rule = rename_back(path, rules)
        state[name] = np.asarray(rule.layout.to_torch(np.asarray(leaf)) if rule.layout else leaf)
    return state


def evaluate(module, variables, inputs, weights, *, train):
    """Returns logits, running statistics, and gradients of the sum of the weighted logits."""
    model = from_linen(module)

    def objective(params, inputs):
        outputs, batch_stats = model.apply(variables | {"params": params}, inputs, train=train)
        return (outputs.logits * weights).sum(), (outputs.logits, batch_stats)

    gradient = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    (_, (logits, batch_stats)), (params, inputs) = jax.jit(gradient)(variables["params"], inputs)
    state = state_dict(module, {"params": params, "batch_stats": batch_stats})
    return {"logits": np.asarray(logits), "images": np.asarray(inputs)} | state


def evaluate_torch(module, network, variables, inputs, weights, *, train):
    """Returns the same as `evaluate`, computed by PyTorch."""
    state = {
        name: torch.tensor(array.copy()) for name, array in state_dict(module, variables).items()
    }
    parameters = {
        name: leaf.requires_grad_() for name, leaf in state.items() if "running" not in name
    }
    inputs = torch.tensor(inputs.transpose(0, 3, 1, 2).copy(), requires_grad=True)
    logits = network(module, state, inputs, train)
    (logits * torch.tensor(weights)).sum().backward()
    results = {"logits": logits, "images": inputs.grad.permute(0, 2, 3, 1)} | state
    results |= {name: leaf.grad for name, leaf in parameters.items()}
    return {name: leaf.detach().numpy() for name, leaf in results.items()}


def check_equals_torch(module, network, inputs, *, train):
    """Compares logits, statistics and gradients to 1e-4 of the largest entry of each array."""
    variables = draw(module)
    weights = images(len(inputs), module.num_classes)
    actual = evaluate(module, variables, inputs, weights, train=train)
    expected = evaluate_torch(module, network, variables, inputs, weights, train=train)
    assert np.std(actual["logits"], axis=0).min() > 0.01  # the logits depend on the images
    assert {*actual} == {*expected}
    largest = {name: abs(array).max() for name, array in expected.items()}
    # The gradient of a shift before a normalisation consists of rounding errors: it is compared
    # relative to the largest of all arrays.
    scale = {name: max(largest[name], 1e-2 * max(largest.values())) for name in expected}
    errors = {name: abs(actual[name] - expected[name]).max() / scale[name] for name in expected}
    assert max(errors.values()) < 1e-4, errors


def check_logits(module, inputs, expected, *, train):
    """Compares the first logits of the first image with PyTorch's for the weights of `draw`."""
    outputs, _ = jax.jit(functools.partial(from_linen(module).apply, train=train))(
        draw(module), inputs
    )
    np.testing.assert_allclose(
        outputs.logits[0, : len(expected)], expected, atol=1e-4 * abs(outputs.logits).max()
    )


def check_rules(module):
    """Checks that the rules are invertible and that all batch counters are omitted."""
    variables = draw(module)
    state = state_dict(module, variables)
    counters = {
        name.replace("running_var", "num_batches_tracked"): np.array(1)
        for name in state
        if "_var" in name
    }
    restored, report = transfer(
        state | counters, variable_shapes(module), rules=module.torch_rules()
    )
    chex.assert_trees_all_equal(restored, variables)
    assert report.complete and len(report.left_out) == len(counters) > 0
    assert len(report.transferred) == len(jax.tree.leaves(variables))
