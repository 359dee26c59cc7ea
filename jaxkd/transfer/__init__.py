"""Weight transfer between parameter trees, new architectures that start from old ones, and fine-tuning."""

from jaxkd.transfer.architecture import Channels, deepen, largest_norm, leading, narrow, widen
from jaxkd.transfer.finetune import freeze, scale_by_path
from jaxkd.transfer.rules import Renamed, Rule, layer_rules, rename, rename_back
from jaxkd.transfer.trees import Mismatch, Report, TransferError, leaves_by_path, transfer

__all__ = [
    "Channels",
    "Mismatch",
    "Renamed",
    "Report",
    "Rule",
    "TransferError",
    "deepen",
    "freeze",
    "largest_norm",
    "layer_rules",
    "leading",
    "leaves_by_path",
    "narrow",
    "rename",
    "rename_back",
    "scale_by_path",
    "transfer",
    "widen",
]
