"""Weight transfer between trees and architectures, and fine-tuning of the result."""

from jaxkd.transfer.architecture import Channels, deepen, largest_norm, leading, narrow, widen
from jaxkd.transfer.finetune import fine_tuning_optimizer, freeze, scale_by_path
from jaxkd.transfer.rules import RenamedPath, Rule, layer_rules, rename, rename_back
from jaxkd.transfer.trees import Mismatch, Report, TransferError, leaves_by_path, transfer

__all__ = [
    "Channels",
    "Mismatch",
    "RenamedPath",
    "Report",
    "Rule",
    "TransferError",
    "deepen",
    "fine_tuning_optimizer",
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
