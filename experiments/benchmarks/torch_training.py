"""The networks of `experiments.benchmarks.training` and their training step in plain PyTorch.

They are written as PyTorch's users write them. Each network has the architecture of the class of
the same name in `jaxkd.models`. The layers of the residual networks are named as in the public
checkpoints, those of the LSTM as its `torch_rules` expects, so that weights can be transferred.
Images are passed as B H W C, which in memory is PyTorch's format `channels_last`; texts are tokens
`[B, S]`, padded with 0 on the right.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Imported by name, so that the type checker runs where PyTorch is not installed.
torch: Any = importlib.import_module("torch")
nn: Any = importlib.import_module("torch.nn")
functional: Any = importlib.import_module("torch.nn.functional")

# The default of `jaxkd.models.BERT`.
DROPOUT = 0.1
Tensor = Any
Module = Any


class CNN(nn.Module):
    """A CNN for images of 32×32.

    Convolutions of 3×3 without padding, each with ReLU and max-pooling, then two dense layers.
    """

    def __init__(self, features: Sequence[int], hidden: int) -> None:
        """Makes the layers."""
        super().__init__()
        layers = []
        channels, size = 3, 32
        for width in features:
            layers += [nn.Conv2d(channels, width, 3), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = width, (size - 2) // 2
        self.convolutions = nn.Sequential(*layers)
        self.hidden = nn.Linear(channels * size**2, hidden)
        self.logits = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits."""
        return self.logits(self.hidden(self.convolutions(x).flatten(1)).relu())


class CifarResNet(nn.Module):
    """A residual network whose shortcuts have no parameters."""

    def __init__(self, blocks: int) -> None:
        """Makes the layers."""
        super().__init__()
        self.conv1 = _conv(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        for i, width in enumerate((16, 32, 64), start=1):
            first = _ResidualBlock(16 if i == 1 else width // 2, width, 1 if i == 1 else 2)
            rest = (_ResidualBlock(width, width, 1) for _ in range(blocks - 1))
            setattr(self, f"layer{i}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits."""
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))


class WideResNet(nn.Module):
    """A wide residual network without dropout."""

    def __init__(self, blocks: int, widen: int) -> None:
        """Makes the layers."""
        super().__init__()
        self.conv1 = _conv(3, 16)
        in_channels = 16
        for i, width in enumerate((16 * widen, 32 * widen, 64 * widen), start=1):
            first = _WideBlock(in_channels, width, 1 if i == 1 else 2)
            rest = (_WideBlock(width, width, 1) for _ in range(blocks - 1))
            # The public checkpoints nest the blocks of a stage under `layer`.
            stage = nn.Module()
            stage.layer = nn.Sequential(first, *rest)
            setattr(self, f"block{i}", stage)
            in_channels = width
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.fc = nn.Linear(in_channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits."""
        x = self.block3.layer(self.block2.layer(self.block1.layer(self.conv1(x))))
        return self.fc(self.bn1(x).relu().mean((2, 3)))


class LSTMClassifier(nn.Module):
    """A text classifier: embedding, two LSTM layers, the last state and two dense layers.

    The layers also read the padding, and the state at the end of each text is selected afterwards:
    packing the texts is slower.
    """

    def __init__(self, vocab_size: int, embedding: int, hidden: Sequence[int], dense: int) -> None:
        """Makes the layers."""
        super().__init__()
        first, second = hidden
        self.embedding = nn.Embedding(vocab_size, embedding, padding_idx=0)
        self.lstm1 = nn.LSTM(embedding, first, batch_first=True)
        self.lstm2 = nn.LSTM(first, second, batch_first=True)
        self.dense = nn.Linear(second, dense)
        self.logits = nn.Linear(dense, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Computes the logits."""
        states, _ = self.lstm2(self.lstm1(self.embedding(tokens))[0])
        ends = (tokens != 0).sum(1) - 1
        last_states = states[torch.arange(len(states), device=states.device), ends]
        return self.logits(self.dense(last_states).relu())


class BERT(nn.Module):
    """A text classifier: transformer encoder, the mean of its states and a dense layer."""

    def __init__(
        self, vocab_size: int, hidden: int, layers: int, heads: int, intermediate: int
    ) -> None:
        """Makes the layers."""
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, hidden, padding_idx=0)
        self.position_embedding = nn.Embedding(512, hidden)
        self.segment_embedding = nn.Embedding(2, hidden)
        self.embedding_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.drop = nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(
            _TransformerBlock(hidden, heads, intermediate) for _ in range(layers)
        )
        self.logits = nn.Linear(hidden, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Computes the logits."""
        where = tokens != 0
        # Every token belongs to segment 0: the inputs are single texts, not pairs.
        segment = self.segment_embedding.weight[0]
        positions = self.position_embedding.weight[: tokens.shape[1]] + segment
        x = self.drop(self.embedding_norm(self.token_embedding(tokens) + positions))
        for block in self.blocks:
            x = block(x, where[:, None, None])
        mean = (x * where[..., None]).sum(1) / where.sum(1, keepdim=True)
        return self.logits(self.drop(mean))


def place(module: Module, inputs: np.ndarray, device: str) -> tuple[Module, Tensor]:
    """Moves a network and its inputs to a device, images `[B, H, W, C]` in channels_last."""
    tensor = torch.from_numpy(inputs).to(device)
    # A permuted view has the shape that PyTorch expects and the memory format channels_last.
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
    """Makes a function that trains the student by one step and returns the loss.

    Args:
        student: The network to train.
        teacher: The network to distil from, or `None` to learn from the labels alone.
        inputs: Images or tokens, from `place`.
        labels: Integer classes [B].
        learning_rate: Of SGD.
        momentum: Of SGD.
        temperature: Softening of both networks' logits.
        alpha: Weight of the soft term; the labels have 1 − alpha.
        compiles: Compiles the forward passes and the loss with `torch.compile`.
        bf16: Runs both networks in bfloat16; weights and loss stay in float32.

    Returns:
        The function of one step.
    """
    targets = torch.from_numpy(labels).to(inputs.device)
    device = inputs.device.type
    optimizer = torch.optim.SGD(student.parameters(), lr=learning_rate, momentum=momentum)

    def loss() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                teacher_logits = None if teacher is None else teacher(inputs).float()
            student_logits = student(inputs).float()
        hard = functional.cross_entropy(student_logits, targets)
        if teacher_logits is None:
            return hard
        soft_targets = (teacher_logits / temperature).softmax(-1)
        soft = functional.cross_entropy(student_logits / temperature, soft_targets)
        # The factor T² keeps the gradient of the soft term independent of the temperature.
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


def make_inference(
    network: Module, inputs: Tensor, *, compiles: bool, bf16: bool
) -> Callable[[], Tensor]:
    """Makes a function that returns a network's logits."""
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
    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.channel_padding = (width - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        # Shortcut A of the paper: a strided slice with new channels of zeros on both sides.
        if self.channel_padding:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.channel_padding, self.channel_padding))
        return (x + y).relu()


class _WideBlock(nn.Module):
    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width)
        self.convShortcut = (
            None if in_channels == width else nn.Conv2d(in_channels, width, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.bn1(x).relu()
        y = self.conv2(self.bn2(self.conv1(activated)).relu())
        return y + (x if self.convShortcut is None else self.convShortcut(activated))


class _TransformerBlock(nn.Module):
    def __init__(self, hidden: int, heads: int, intermediate: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.attention_output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.mlp_in = nn.Linear(hidden, intermediate)
        self.mlp_out = nn.Linear(intermediate, hidden)
        self.mlp_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.drop = nn.Dropout(DROPOUT)
        self.heads = heads

    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        projections = (layer(x) for layer in (self.query, self.key, self.value))
        query, key, value = (self._split_heads(projection) for projection in projections)
        # The functional form does not know whether the module is training.
        dropout = self.drop.p if self.training else 0.0
        context = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=where, dropout_p=dropout
        )
        attended = self.attention_output(context.transpose(1, 2).flatten(2))
        x = self.attention_norm(x + self.drop(attended))
        hidden = functional.gelu(self.mlp_in(x))
        return self.mlp_norm(x + self.drop(self.mlp_out(hidden)))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _conv(in_channels: int, width: int, stride: int = 1) -> Module:
    return nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
