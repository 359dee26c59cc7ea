"""Distillation losses as pure functions that return one value per example.

Importing this package loads only jax and optax. The catalogue, `docs/api/catalogue.md`, lists every
function with its formula and paper.

Defaults follow one rule:

- In a loss on softened logits, `temperature` is 2.0, and the weight `alpha` of the teacher is 0.5.
- Another hyper-parameter has the value that its paper or the authors' code fixes. So has a
  temperature: 1.0 in `normalized_loss`, `enhanced_target_loss`, `channel_wise_divergence` and
  `universal_logit_loss`, 0.07 in the contrastive losses.
- What papers choose by task has no default: `beta`, but for the forward KL of
  `fused_linear_distillation_loss`, `non_target_weight`, `correct`, `exponent`,
  `masked_fraction`, `correlation_weight`, `order`, the `size` of class activation maps, α and β of
  the α-β divergence. Nor has what changes with training: `fraction`, `strength`.
- What must agree with another call has no default: the `temperature` of `temperature_softmax`,
  `ensemble_logits` and `calibrate_bank` is that of the loss that follows.
"""

from jaxkd.losses.activations import (
    activation_boundary_loss,
    many_to_one_loss,
)
from jaxkd.losses.alignment import (
    aligned_states_loss,
    cross_layer_weights,
    init_aligned_states,
    init_semantic_calibration,
    semantic_calibration_loss,
)
from jaxkd.losses.branches import (
    enhanced_target_loss,
)
from jaxkd.losses.checks import (
    check_logits,
)
from jaxkd.losses.contrastive import (
    ContrastiveBank,
    calibrate_bank,
    contrastive_bank_loss,
    contrastive_loss,
    draw_negatives,
    init_bank,
    update_bank,
)
from jaxkd.losses.curriculum import (
    Interpolation,
    curriculum_temperature,
    init_curriculum_temperature,
    init_instance_temperature,
    init_interpolation,
    instance_temperature,
    interpolated_logits,
    reverse_gradient,
    update_interpolation,
)
from jaxkd.losses.divergences import (
    adaptive_kl_divergence,
    alpha_beta_divergence,
    renyi_divergence,
    skewed_kl_divergence,
    skewed_reverse_kl_divergence,
    total_variation_distance,
    transformed_teacher_loss,
)
from jaxkd.losses.factors import (
    extract_factors,
    factor_transfer_loss,
    init_factors,
    init_paraphraser,
    paraphraser_loss,
)
from jaxkd.losses.features import (
    attention_transfer_loss,
    attention_transfer_map,
    attention_transfer_mse_loss,
    flow_matrix,
    flow_of_solution_procedure_loss,
    hint_loss,
    init_projector,
    init_variational_information,
    neuron_selectivity_loss,
    project,
    variational_information_loss,
)
from jaxkd.losses.fused import (
    fused_linear_jensen_shannon_divergence,
    fused_linear_kl_divergence,
    fused_linear_reverse_kl_divergence,
)
from jaxkd.losses.fused_targets import (
    fused_linear_cross_entropy,
    fused_linear_distillation_loss,
    fused_linear_sparse_kl_divergence,
)
from jaxkd.losses.heads import (
    LinearHead,
)
from jaxkd.losses.labels import (
    decoupled_loss,
    distillation_loss,
    hard_cross_entropy,
    label_smoothing_loss,
    normalized_loss,
    virtual_teacher_logits,
)
from jaxkd.losses.logits import (
    jensen_shannon_divergence,
    kl_divergence,
    logit_mse_loss,
    reverse_kl_divergence,
    soft_cross_entropy,
    standardize_logits,
    temperature_softmax,
)
from jaxkd.losses.on_policy import (
    rewards_to_go,
    sequence_reverse_kl_loss,
)
from jaxkd.losses.orthogonal import (
    init_orthogonal_projector,
    orthogonal_projection_loss,
    project_orthogonally,
    whiten_features,
)
from jaxkd.losses.ranking import (
    margin_mse_loss,
    nested_loss,
    score_divergence_loss,
)
from jaxkd.losses.refinement import (
    batch_correlation_loss,
    class_correlation_loss,
    multi_level_loss,
    refined_logits_loss,
)
from jaxkd.losses.relations import (
    correlation_congruence_loss,
    dist_inter_loss,
    dist_intra_loss,
    linear_cka,
    linear_cka_loss,
    probabilistic_transfer_loss,
    relational_angle_loss,
    relational_distance_loss,
    similarity_preserving_loss,
)
from jaxkd.losses.review import (
    hierarchical_context_loss,
    init_review,
    review_features,
    review_loss,
)
from jaxkd.losses.sequence import (
    next_tokens,
    token_distillation_loss,
    token_mean,
)
from jaxkd.losses.simple_recipe import simple_recipe_loss
from jaxkd.losses.sparse import (
    SampledClasses,
    TopK,
    expand_top_k,
    sample_classes,
    sampled_cross_entropy,
    sparse_jensen_shannon_divergence,
    sparse_kl_divergence,
    sparse_soft_cross_entropy,
    top_k,
)
from jaxkd.losses.spatial import (
    channel_wise_divergence,
    class_activation_maps,
    class_attention_loss,
    init_masked_generation,
    masked_generation_loss,
    pool_to,
)
from jaxkd.losses.teachers import (
    ensemble_logits,
    example_weights,
    teacher_weights,
    weighted_sum,
)
from jaxkd.losses.transformer import (
    attention_divergence_loss,
    attention_map_loss,
    custom_layers,
    hidden_cosine_loss,
    hidden_mse_loss,
    last_layers,
    layers_loss,
    skip_layers,
    uniform_layers,
    value_relation_loss,
)
from jaxkd.losses.vocabularies import (
    align_tokens,
    universal_logit_loss,
)

__all__ = [
    "ContrastiveBank",
    "Interpolation",
    "LinearHead",
    "SampledClasses",
    "TopK",
    "activation_boundary_loss",
    "adaptive_kl_divergence",
    "align_tokens",
    "aligned_states_loss",
    "alpha_beta_divergence",
    "attention_divergence_loss",
    "attention_map_loss",
    "attention_transfer_loss",
    "attention_transfer_map",
    "attention_transfer_mse_loss",
    "batch_correlation_loss",
    "calibrate_bank",
    "channel_wise_divergence",
    "check_logits",
    "class_activation_maps",
    "class_attention_loss",
    "class_correlation_loss",
    "contrastive_bank_loss",
    "contrastive_loss",
    "correlation_congruence_loss",
    "cross_layer_weights",
    "curriculum_temperature",
    "custom_layers",
    "decoupled_loss",
    "dist_inter_loss",
    "dist_intra_loss",
    "distillation_loss",
    "draw_negatives",
    "enhanced_target_loss",
    "ensemble_logits",
    "example_weights",
    "expand_top_k",
    "extract_factors",
    "factor_transfer_loss",
    "flow_matrix",
    "flow_of_solution_procedure_loss",
    "fused_linear_cross_entropy",
    "fused_linear_distillation_loss",
    "fused_linear_jensen_shannon_divergence",
    "fused_linear_kl_divergence",
    "fused_linear_reverse_kl_divergence",
    "fused_linear_sparse_kl_divergence",
    "hard_cross_entropy",
    "hidden_cosine_loss",
    "hidden_mse_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "init_aligned_states",
    "init_bank",
    "init_curriculum_temperature",
    "init_factors",
    "init_instance_temperature",
    "init_interpolation",
    "init_masked_generation",
    "init_orthogonal_projector",
    "init_paraphraser",
    "init_projector",
    "init_review",
    "init_semantic_calibration",
    "init_variational_information",
    "instance_temperature",
    "interpolated_logits",
    "jensen_shannon_divergence",
    "kl_divergence",
    "label_smoothing_loss",
    "last_layers",
    "layers_loss",
    "linear_cka",
    "linear_cka_loss",
    "logit_mse_loss",
    "many_to_one_loss",
    "margin_mse_loss",
    "masked_generation_loss",
    "multi_level_loss",
    "nested_loss",
    "neuron_selectivity_loss",
    "next_tokens",
    "normalized_loss",
    "orthogonal_projection_loss",
    "paraphraser_loss",
    "pool_to",
    "probabilistic_transfer_loss",
    "project",
    "project_orthogonally",
    "refined_logits_loss",
    "relational_angle_loss",
    "relational_distance_loss",
    "renyi_divergence",
    "reverse_gradient",
    "reverse_kl_divergence",
    "review_features",
    "review_loss",
    "rewards_to_go",
    "sample_classes",
    "sampled_cross_entropy",
    "score_divergence_loss",
    "semantic_calibration_loss",
    "sequence_reverse_kl_loss",
    "similarity_preserving_loss",
    "simple_recipe_loss",
    "skewed_kl_divergence",
    "skewed_reverse_kl_divergence",
    "skip_layers",
    "soft_cross_entropy",
    "sparse_jensen_shannon_divergence",
    "sparse_kl_divergence",
    "sparse_soft_cross_entropy",
    "standardize_logits",
    "teacher_weights",
    "temperature_softmax",
    "token_distillation_loss",
    "token_mean",
    "top_k",
    "total_variation_distance",
    "transformed_teacher_loss",
    "uniform_layers",
    "universal_logit_loss",
    "update_bank",
    "update_interpolation",
    "value_relation_loss",
    "variational_information_loss",
    "virtual_teacher_logits",
    "weighted_sum",
    "whiten_features",
]
