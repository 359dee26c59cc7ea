"""Models as pairs of pure functions, and the networks that come with the library.

A constructor such as `resnet20` makes a Flax module, which `from_linen` turns into the pair. Nothing outside this
package imports Flax.
"""

from jaxkd.models.bert import BERT, bert_pooling, distilbert_pooling, mean_pooling
from jaxkd.models.cifar_resnet import (
    CifarResNet,
    resnet8x4,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from jaxkd.models.cnn import CNN, max_pool
from jaxkd.models.efficientnet import (
    EfficientNet,
    EfficientNetLite,
    efficientnet_b0,
    efficientnet_b1,
    efficientnet_b2,
    efficientnet_b3,
    efficientnet_b4,
    efficientnet_b5,
    efficientnet_b6,
    efficientnet_b7,
    efficientnet_lite0,
)
from jaxkd.models.lstm import LSTMClassifier
from jaxkd.models.mobilenet import MobileNetV2, mobilenet_v2
from jaxkd.models.model import Model, Outputs, computing_in, from_linen, from_nnx, frozen_statistics, standardized
from jaxkd.models.plain import PlainCNN, plain2, plain4, plain6, plain8, plain10
from jaxkd.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101
from jaxkd.models.seq2seq import Seq2Seq
from jaxkd.models.transformer import Transformer
from jaxkd.models.vgg import VGG, vgg8, vgg13
from jaxkd.models.wrn import WideResNet, wrn16_2, wrn40_2

__all__ = [
    "BERT",
    "CNN",
    "VGG",
    "CifarResNet",
    "EfficientNet",
    "EfficientNetLite",
    "LSTMClassifier",
    "MobileNetV2",
    "Model",
    "Outputs",
    "PlainCNN",
    "ResNet",
    "Seq2Seq",
    "Transformer",
    "WideResNet",
    "bert_pooling",
    "computing_in",
    "distilbert_pooling",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_lite0",
    "from_linen",
    "from_nnx",
    "frozen_statistics",
    "max_pool",
    "mean_pooling",
    "mobilenet_v2",
    "plain2",
    "plain4",
    "plain6",
    "plain8",
    "plain10",
    "resnet8x4",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "standardized",
    "vgg8",
    "vgg13",
    "wrn16_2",
    "wrn40_2",
]
