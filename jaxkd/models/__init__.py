"""Models as pairs of pure functions, and the networks that come with the library.

A constructor such as `resnet20` makes a Flax module, and `from_linen` makes the pair from it. No
other package of the library imports Flax.
"""

import jaxkd.models._flax  # noqa: F401  (before the networks, which import Flax)
from jaxkd.models._features import feature_paths
from jaxkd.models._linen import from_linen
from jaxkd.models._nnx import from_nnx
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
from jaxkd.models.description import describe_module, make_module
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
from jaxkd.models.joint import join
from jaxkd.models.layers import BatchNorm
from jaxkd.models.lstm import LSTMClassifier
from jaxkd.models.mobilenet import MobileNetV2, mobilenet_v2
from jaxkd.models.model import Model, Network, Outputs
from jaxkd.models.plain import PlainCNN, plain2, plain4, plain6, plain8, plain10
from jaxkd.models.quantization import (
    dequantize_weights,
    quantize_weights,
    with_quantized_weights,
)
from jaxkd.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101
from jaxkd.models.seq2seq import Seq2Seq
from jaxkd.models.transformer import Transformer
from jaxkd.models.vgg import VGG, vgg8, vgg13
from jaxkd.models.wrappers import (
    with_class_order,
    with_compute_dtype,
    with_frozen_batch_stats,
    with_input_normalization,
)
from jaxkd.models.wrn import WideResNet, wrn16_2, wrn40_2

__all__ = [
    "BERT",
    "CNN",
    "VGG",
    "BatchNorm",
    "CifarResNet",
    "EfficientNet",
    "EfficientNetLite",
    "LSTMClassifier",
    "MobileNetV2",
    "Model",
    "Network",
    "Outputs",
    "PlainCNN",
    "ResNet",
    "Seq2Seq",
    "Transformer",
    "WideResNet",
    "bert_pooling",
    "dequantize_weights",
    "describe_module",
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
    "feature_paths",
    "from_linen",
    "from_nnx",
    "join",
    "make_module",
    "max_pool",
    "mean_pooling",
    "mobilenet_v2",
    "plain2",
    "plain4",
    "plain6",
    "plain8",
    "plain10",
    "quantize_weights",
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
    "vgg8",
    "vgg13",
    "with_class_order",
    "with_compute_dtype",
    "with_frozen_batch_stats",
    "with_input_normalization",
    "with_quantized_weights",
    "wrn16_2",
    "wrn40_2",
]
