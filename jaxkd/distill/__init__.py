"""Plans of stages, the training step, and the devices on which they run."""

from jaxkd.distill._compile import group_by_program
from jaxkd.distill._schedule import count_concurrent_stages
from jaxkd.distill._stage_run import TrainedModel
from jaxkd.distill.distributed import (
    broadcast_from_primary,
    initialize_distributed,
    is_primary_process,
    share_fate,
)
from jaxkd.distill.outputs import RunOutputs, find_best, save_results
from jaxkd.distill.placement import (
    MeshPlacement,
    Placement,
    PmapPlacement,
    VectorizedPlacement,
    make_mesh,
    single_device,
)
from jaxkd.distill.plan import (
    AVERAGE,
    KEY_PURPOSES,
    Derived,
    Entry,
    Examples,
    Pretrained,
    Stage,
    order,
    teacher_baselines,
)
from jaxkd.distill.runner import evaluate_plan, run_plan
from jaxkd.distill.schemes import born_again, ensemble, mutual_learning
from jaxkd.distill.selection import Best
from jaxkd.distill.step import (
    Batch,
    BatchInfo,
    LossContext,
    LossFn,
    TrainState,
    init_train_state,
    make_train_step,
)
from jaxkd.losses.sparse import TopK, expand_top_k, top_k

__all__ = [
    "AVERAGE",
    "KEY_PURPOSES",
    "Batch",
    "BatchInfo",
    "Best",
    "Derived",
    "Entry",
    "Examples",
    "LossContext",
    "LossFn",
    "MeshPlacement",
    "Placement",
    "PmapPlacement",
    "Pretrained",
    "RunOutputs",
    "Stage",
    "TopK",
    "TrainState",
    "TrainedModel",
    "VectorizedPlacement",
    "born_again",
    "broadcast_from_primary",
    "count_concurrent_stages",
    "ensemble",
    "evaluate_plan",
    "expand_top_k",
    "find_best",
    "group_by_program",
    "init_train_state",
    "initialize_distributed",
    "is_primary_process",
    "make_mesh",
    "make_train_step",
    "mutual_learning",
    "order",
    "run_plan",
    "save_results",
    "share_fate",
    "single_device",
    "teacher_baselines",
    "top_k",
]
