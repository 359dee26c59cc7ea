"""The networks of `experiments.training_benchmark` and their training step in plain PyTorch, as its users write them.

Each network has the architecture of its namesake in `jaxkd.models`. The residual ones have the names of the public
checkpoints and the LSTM those that `torch_rules` of its namesake reads, as theirs do. Images are B H W C outside and
lie so in memory, in PyTorch's format `channels_last`; texts are tokens `[B, S]`, padded with 0 on the right.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# By name, so that types can be checked where PyTorch is not installed.
torch: Any = importlib.import_module("torch")
nn: Any = importlib.import_module("torch.nn")
functional: Any = importlib.import_module("torch.nn.functional")

DROPOUT = 0.1
Tensor = Any
Module = Any


class CNN(nn.Module):
    """Convolutions of 3×3 without padding, each with ReLU and pooling; two dense layers; for images of 32×32."""

    def __init__(self, features: Sequence[int], hidden: int) -> None:
        """Makes the weights."""
        super().__init__()
        layers, channels, size = [], 3, 32
        for width in features:
            layers += [nn.Conv2d(channels, width, 3), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = width, (size - 2) // 2
        self.convolutions = nn.Sequential(*layers)
        self.hidden, self.logits = nn.Linear(channels * size**2, hidden), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.logits(self.hidden(self.convolutions(x).flatten(1)).relu())


class CifarResNet(nn.Module):
    """A residual network with shortcuts that have no parameters."""

    def __init__(self, blocks: int) -> None:
        """Makes the weights."""
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 16), nn.BatchNorm2d(16)
        for i, width in enumerate((16, 32, 64), start=1):
            first = _ResidualBlock(16 if i == 1 else width // 2, width, 1 if i == 1 else 2)
            rest = (_ResidualBlock(width, width, 1) for _ in range(blocks - 1))
            setattr(self, f"layer{i}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))


class WideResNet(nn.Module):
    """A wide residual network without dropout."""

    def __init__(self, blocks: int, widen: int) -> None:
        """Makes the weights."""
        super().__init__()
        self.conv1, before = _conv(3, 16), 16
        for i, width in enumerate((16 * widen, 32 * widen, 64 * widen), start=1):
            first = _WideBlock(before, width, 1 if i == 1 else 2)
            block, before = nn.Module(), width
            block.layer = nn.Sequential(first, *(_WideBlock(width, width, 1) for _ in range(blocks - 1)))
            setattr(self, f"block{i}", block)
        self.bn1, self.fc = nn.BatchNorm2d(before), nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.block3.layer(self.block2.layer(self.block1.layer(self.conv1(x))))
        return self.fc(self.bn1(x).relu().mean((2, 3)))


class LSTMClassifier(nn.Module):
    """Embedding, two LSTM layers, the last state and two dense layers.

    The layers read the padding as well, and the state at a text's end is looked up: packing the texts is slower.
    """

    def __init__(self, vocab_size: int, embedding: int, hidden: Sequence[int], dense: int) -> None:
        """Makes the weights."""
        super().__init__()
        first, second = hidden
        self.embedding = nn.Embedding(vocab_size, embedding, padding_idx=0)
        self.lstm1, self.lstm2 = nn.LSTM(embedding, first, batch_first=True), nn.LSTM(first, second, batch_first=True)
        self.dense, self.logits = nn.Linear(second, dense), nn.Linear(dense, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        states, _ = self.lstm2(self.lstm1(self.embedding(tokens))[0])
        ends = (tokens != 0).sum(1) - 1
        return self.logits(self.dense(states[torch.arange(len(states), device=states.device), ends]).relu())


class BERT(nn.Module):
    """Encoder of texts, the mean of its states and a dense layer."""

    def __init__(self, vocab_size: int, hidden: int, layers: int, heads: int, intermediate: int) -> None:
        """Makes the weights."""
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, hidden, padding_idx=0)
        self.position_embedding, self.segment_embedding = nn.Embedding(512, hidden), nn.Embedding(2, hidden)
        self.embedding_norm, self.drop = nn.LayerNorm(hidden, eps=1e-12), nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(_TransformerBlock(hidden, heads, intermediate) for _ in range(layers))
        self.logits = nn.Linear(hidden, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        where = tokens != 0
        added = self.position_embedding.weight[: tokens.shape[1]] + self.segment_embedding.weight[0]
        x = self.drop(self.embedding_norm(self.token_embedding(tokens) + added))
        for block in self.blocks:
            x = block(x, where[:, None, None])
        mean = (x * where[..., None]).sum(1) / where.sum(1, keepdim=True)
        return self.logits(self.drop(mean))


def place(module: Module, inputs: np.ndarray, device: str) -> tuple[Module, Tensor]:
    """A network and its inputs on a device; images `[B, H, W, C]` channels last."""
    tensor = torch.from_numpy(inputs).to(device)
    if tensor.ndim == 4:
        tensor = tensor.permute(0, 3, 1, 2)
    return module.to(device, memory_format=torch.channels_last), tensor


def make_training(
    student: Module,
    teacher: Module | None,
    inputs: Tensor,
    labels: np.ndarray,
    *,
    learning_rate: float,
    momentum: float,
    temperature: float,
    alpha: float,
    compiles: bool,
    bf16: bool,
) -> Callable[[], Tensor]:
    """A call of which trains the student by one step, from a teacher if there is one, and returns the loss."""
    targets, device = torch.from_numpy(labels).to(inputs.device), inputs.device.type
    optimizer = torch.optim.SGD(student.parameters(), lr=learning_rate, momentum=momentum)

    def loss() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                taught = None if teacher is None else teacher(inputs).float()
            logits = student(inputs).float()
        hard = functional.cross_entropy(logits, targets)
        if taught is None:
            return hard
        soft = functional.cross_entropy(logits / temperature, (taught / temperature).softmax(-1))
        return alpha * temperature**2 * soft + (1 - alpha) * hard

    student.train()
    if teacher is not None:
        teacher.eval()
    evaluate = torch.compile(loss, dynamic=False) if compiles else loss

    def step() -> Tensor:
        optimizer.zero_grad()
        value = evaluate()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def make_inference(network: Module, inputs: Tensor, *, compiles: bool, bf16: bool) -> Callable[[], Tensor]:
    """A call of which returns a network's logits."""
    network.eval()
    device = inputs.device.type

    def logits() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return network(inputs)

    evaluate = torch.compile(logits, dynamic=False) if compiles else logits

    def infer() -> Tensor:
        with torch.no_grad():
            return evaluate()

    return infer


class _ResidualBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(before, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width), nn.BatchNorm2d(width)
        self.stride, self.half = stride, (width - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.half:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.half, self.half))
        return (x + y).relu()


class _WideBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), _conv(before, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), _conv(width, width)
        self.convShortcut = None if before == width else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.bn1(x).relu()
        y = self.conv2(self.bn2(self.conv1(active)).relu())
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class _TransformerBlock(nn.Module):
    def __init__(self, hidden: int, heads: int, intermediate: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.attention_output, self.attention_norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden, eps=1e-12)
        self.mlp_in, self.mlp_out = nn.Linear(hidden, intermediate), nn.Linear(intermediate, hidden)
        self.mlp_norm, self.drop, self.heads = nn.LayerNorm(hidden, eps=1e-12), nn.Dropout(DROPOUT), heads

    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        by_head = (self._by_head(layer(x)) for layer in (self.query, self.key, self.value))
        dropout = self.drop.p if self.training else 0.0
        context = functional.scaled_dot_product_attention(*by_head, attn_mask=where, dropout_p=dropout)
        x = self.attention_norm(x + self.drop(self.attention_output(context.transpose(1, 2).flatten(2))))
        inner = functional.gelu(self.mlp_in(x))
        return self.mlp_norm(x + self.drop(self.mlp_out(inner)))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _conv(before: int, width: int, stride: int = 1) -> Module:
    return nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
