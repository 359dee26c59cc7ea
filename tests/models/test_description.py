"""Tests of networks as text."""

import flax.linen as nn
import pytest

from jaxkd import models
from jaxkd.models.description import find_networks


def test_every_constructor_is_described_by_its_name():
    constructors = [name for name in find_networks() if name[0].islower()]
    assert "resnet20" in constructors and "mobilenet_v2" in constructors
    for name in constructors:
        module = models.make_module(name, num_classes=7)
        description = models.describe_module(module)
        assert description == f"{name}(num_classes=7)"
        assert models.make_module(description) == module


@pytest.mark.parametrize(
    "module",
    [
        models.CNN((16, 32), hidden=8, num_classes=3),
        models.PlainCNN(((4, 4), (8,)), num_classes=2),
        models.LSTMClassifier(100, hidden=(8,), dropout=0.5, bidirectional=True),
        models.BERT(100, layers=2, pooling=models.mean_pooling),
        models.CifarResNet(blocks=2, num_classes=5),
    ],
)
def test_modules_come_back_from_their_description(module):
    assert models.make_module(models.describe_module(module)) == module


def test_short_names():
    assert models.make_module("cnn", num_classes=4) == models.CNN(num_classes=4)
    lstm = models.make_module("lstm(vocab_size=9)", num_classes=4)
    assert lstm == models.LSTMClassifier(9, num_classes=4)


def test_number_of_classes_in_the_description_counts():
    assert models.make_module("CNN(num_classes=3)", num_classes=4).num_classes == 3


class OwnModule(nn.Module):
    num_classes: int = 10


def test_other_modules_have_no_description():
    assert models.describe_module(OwnModule()) is None
    assert models.describe_module(models.BERT(100, activation=nn.silu)) is None


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("resnet21", "no network 'resnet21' in jaxkd.models: .* such as resnet"),
        ("BatchNorm", "no network 'BatchNorm'"),
        ("CNN(feature=(3,))", "CNN does not take feature: choose from features, hidden"),
        ("LSTMClassifier", r"needs vocab_size, as in LSTMClassifier\(vocab_size=...\)"),
        ("CNN((3,))", "cannot read the network .* keywords such as CNN"),
        ("CNN(hidden=__import__('os').getpid())", "cannot read the network"),
        ("CNN(hidden=open)", "cannot read the network"),
        ("a.b()", "cannot read the network"),
        ("CNN(**{})", "cannot read the network"),
        ("(" * 1500, "cannot read the network"),
        ("x" * 3000, "more than 2,000 characters"),
        ("CNN(num_classes=0)", "num_classes must be an integer from 1"),
        ("CNN(num_classes=10**12)", "cannot read the network"),
        ("CNN(num_classes=True)", "num_classes must be an integer from 1"),
    ],
)
def test_bad_descriptions(description, message):
    with pytest.raises(ValueError, match=message) as error:
        models.make_module(description, num_classes=10)
    assert len(str(error.value)) <= 300
