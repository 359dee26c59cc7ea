"""Tests every function of `jaxkd.losses` under jit, vmap, pmap and sharding, and narrow dtypes."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses

B = 8
KEY = jax.random.key(0)


def normal(*shape, number=0):
    return jax.random.normal(jax.random.fold_in(KEY, number), shape)


LOGITS = normal(B, 5), normal(B, 5, number=1)
TOKENS = normal(B, 3, 7), normal(B, 3, 7, number=1)
MAPS = normal(B, 3, 3, 4), normal(B, 3, 3, 4, number=1)
WIDER = normal(B, 3, 3, 4), normal(B, 3, 3, 6, number=1)
EMBEDDINGS = normal(B, 6), normal(B, 6, number=1)
UNEQUAL = normal(B, 6), normal(B, 9, number=1)
STATES = normal(B, 4, 6), normal(B, 4, 6, number=1)
LABELS = jnp.arange(B) % 5
MAP_MASK = jnp.ones((B, 3, 3), bool).at[1, 2].set(False)
NEXT_TOKENS = jnp.arange(3 * B).reshape(B, 3) % 7
TOKEN_MASK = jnp.ones((B, 3), bool).at[1, 2].set(False)
TEACHERS = normal(B, 2, 5, number=2)
ATTENTION = normal(B, 2, 4, 4), normal(B, 2, 4, 4, number=1)
VALUES = normal(B, 4, 2, 3), normal(B, 4, 2, 3, number=1)
UNEMBEDDINGS = normal(6, 7, number=3), normal(9, 7, number=4)
BANK = losses.init_bank(KEY, 20, 6)
INDEX = jnp.arange(B)
NEGATIVES = 8 + jnp.arange(4 * B).reshape(B, 4) % 12
SAMPLED = losses.sample_classes(KEY, LOGITS[1], count=3)
PROJECTOR = losses.init_projector(KEY, 6, 9)
VARIATIONAL = losses.init_variational_information(KEY, 4, 6)
CALIBRATION = losses.init_semantic_calibration(KEY, (4, 6), (4, 6), 5)
ALIGNED = losses.init_aligned_states(KEY, 6, 6)
OTHER_VOCABULARY = TOKENS[0], normal(B, 3, 9, number=1)
STUDENT_ENDS = jnp.broadcast_to(jnp.array([1, 3, 4]), (B, 3))
TEACHER_ENDS = jnp.broadcast_to(jnp.array([1, 2, 3, 4]), (B, 4))
RECIPE = losses.init_projector(KEY, 6, 9)
INSTANCE_TEMPERATURE = losses.init_instance_temperature(KEY, 5, 8)
ORTHOGONAL = losses.init_orthogonal_projector(KEY, 6, 9)
REVIEW = losses.init_review(KEY, (4, 6), (6, 4), 5)
FACTORS = losses.init_factors(KEY, 4, 3)
PARAPHRASER = losses.init_paraphraser(KEY, 4, 2)
GENERATION = losses.init_masked_generation(KEY, 4, 6)


def with_temperature(**options):
    return {"temperature": 2.0} | options


def with_instance_temperature(student, teacher):
    temperature = losses.instance_temperature(INSTANCE_TEMPERATURE, student, teacher, strength=0.5)
    logits = (z / temperature[:, None] for z in (student, teacher))
    return temperature**2 * losses.kl_divergence(*logits, temperature=1.0)


# name: (arrays whose first axis is the batch, the function of them)
CASES = {
    "temperature_softmax": (
        LOGITS[:1],
        lambda z: losses.temperature_softmax(z, **with_temperature()),
    ),
    "soft_cross_entropy": (
        LOGITS,
        lambda s, t: losses.soft_cross_entropy(s, t, weights=jnp.arange(5.0), **with_temperature()),
    ),
    "kl_divergence": (
        LOGITS,
        lambda s, t: losses.kl_divergence(s, t, weights=jnp.arange(5.0), **with_temperature()),
    ),
    "reverse_kl_divergence": (
        LOGITS,
        lambda s, t: losses.reverse_kl_divergence(s, t, **with_temperature()),
    ),
    "jensen_shannon_divergence": (
        LOGITS,
        lambda s, t: losses.jensen_shannon_divergence(s, t, **with_temperature(beta=0.3)),
    ),
    "skewed_kl_divergence": (LOGITS, losses.skewed_kl_divergence),
    "skewed_reverse_kl_divergence": (LOGITS, losses.skewed_reverse_kl_divergence),
    "adaptive_kl_divergence": (LOGITS, losses.adaptive_kl_divergence),
    "alpha_beta_divergence": (
        LOGITS,
        lambda s, t: losses.alpha_beta_divergence(s, t, alpha=0.2, beta=0.7),
    ),
    "renyi_divergence": (LOGITS, lambda s, t: losses.renyi_divergence(s, t, order=2.0)),
    "total_variation_distance": (LOGITS, losses.total_variation_distance),
    "transformed_teacher_loss": (
        LOGITS,
        lambda s, t: losses.transformed_teacher_loss(s, t, weighted=True),
    ),
    "top_k": (LOGITS[:1], lambda z: losses.top_k(z, k=2).values),
    "expand_top_k": (
        LOGITS[:1],
        lambda z: losses.expand_top_k(losses.top_k(z, k=2), num_classes=5),
    ),
    "sparse_soft_cross_entropy": (
        LOGITS,
        lambda s, t: losses.sparse_soft_cross_entropy(s, losses.top_k(t, k=2)),
    ),
    "sparse_kl_divergence": (
        LOGITS,
        lambda s, t: losses.sparse_kl_divergence(s, losses.top_k(t, k=2)),
    ),
    "sparse_jensen_shannon_divergence": (
        LOGITS,
        lambda s, t: losses.sparse_jensen_shannon_divergence(s, losses.top_k(t, k=2), beta=0.3),
    ),
    "sampled_cross_entropy": (
        (LOGITS[0], SAMPLED.indices, SAMPLED.weights),
        lambda s, i, w: losses.sampled_cross_entropy(s, losses.SampledClasses(i, w)),
    ),
    "interpolated_logits": (
        LOGITS,
        lambda s, t: losses.interpolated_logits(s, t, fraction=0.3),
    ),
    "reverse_gradient": (LOGITS[:1], lambda x: losses.reverse_gradient(x, strength=0.5)),
    "curriculum_temperature": (
        LOGITS,
        lambda s, t: losses.kl_divergence(
            s,
            t,
            temperature=losses.curriculum_temperature(
                losses.init_curriculum_temperature(), strength=0.5
            ),
        ),
    ),
    "init_instance_temperature": (
        LOGITS,
        lambda s, t: losses.instance_temperature(
            losses.init_instance_temperature(KEY, s.shape[-1], 8), s, t, strength=0.5
        ),
    ),
    "instance_temperature": (LOGITS, with_instance_temperature),
    "refined_logits_loss": (
        (*LOGITS, LABELS),
        lambda s, t, y: losses.refined_logits_loss(s, t, y, correlation_weight=2.0),
    ),
    "batch_correlation_loss": (LOGITS, losses.batch_correlation_loss),
    "class_correlation_loss": (LOGITS, losses.class_correlation_loss),
    "multi_level_loss": (LOGITS, losses.multi_level_loss),
    "logit_mse_loss": (LOGITS, losses.logit_mse_loss),
    "standardize_logits": (LOGITS[:1], losses.standardize_logits),
    "hard_cross_entropy": (
        (LOGITS[0], LABELS),
        lambda z, y: losses.hard_cross_entropy(z, y, weights=jnp.arange(5.0)),
    ),
    "label_smoothing_loss": (
        (LOGITS[0], LABELS),
        lambda z, y: losses.label_smoothing_loss(z, y, smoothing=0.1),
    ),
    "virtual_teacher_logits": (
        (LABELS,),
        lambda y: losses.virtual_teacher_logits(y, num_classes=5, correct=0.9),
    ),
    "distillation_loss": ((*LOGITS, LABELS), losses.distillation_loss),
    "decoupled_loss": (
        (*LOGITS, LABELS),
        lambda s, t, y: losses.decoupled_loss(s, t, y, **with_temperature(non_target_weight=8.0)),
    ),
    "normalized_loss": ((*LOGITS, LABELS), losses.normalized_loss),
    "enhanced_target_loss": (
        (*LOGITS, LABELS),
        lambda s, t, y: losses.enhanced_target_loss(s, t, y, **with_temperature(exponent=1.5)),
    ),
    "ensemble_logits": (
        (TEACHERS,),
        lambda z: losses.ensemble_logits(
            z.swapaxes(0, 1), weights=(0.7, 0.3), **with_temperature()
        ),
    ),
    "teacher_weights": (
        (TEACHERS, LABELS),
        lambda z, y: losses.teacher_weights(z.swapaxes(0, 1), y).T,
    ),
    "example_weights": ((*LOGITS, LABELS), losses.example_weights),
    "weighted_sum": (
        (LOGITS[0][:, 0], LOGITS[1][:, 0]),
        lambda *terms: losses.weighted_sum(terms, weights=(0.7, 0.3)),
    ),
    "init_projector": (UNEQUAL[:1], lambda x: losses.project(losses.init_projector(KEY, 6, 9), x)),
    "project": (UNEQUAL[:1], lambda x: losses.project(PROJECTOR, x)),
    "hint_loss": (MAPS, losses.hint_loss),
    "attention_transfer_map": (MAPS[:1], losses.attention_transfer_map),
    "attention_transfer_loss": (WIDER, losses.attention_transfer_loss),
    "attention_transfer_mse_loss": (WIDER, losses.attention_transfer_mse_loss),
    "init_variational_information": (
        WIDER,
        lambda s, t: losses.variational_information_loss(
            losses.init_variational_information(KEY, 4, 6), s, t
        ),
    ),
    "variational_information_loss": (
        WIDER,
        lambda s, t: losses.variational_information_loss(VARIATIONAL, s, t),
    ),
    "neuron_selectivity_loss": (WIDER, losses.neuron_selectivity_loss),
    "flow_matrix": (WIDER, losses.flow_matrix),
    "flow_of_solution_procedure_loss": (
        WIDER,
        lambda s, t: losses.flow_of_solution_procedure_loss(
            s, t[..., :3], t[..., 2:], s[..., :3][..., ::-1]
        ),
    ),
    "pool_to": (MAPS[:1], lambda x: losses.pool_to(x, (2, 1))),
    "channel_wise_divergence": (
        (*MAPS, MAP_MASK),
        lambda s, t, w: losses.channel_wise_divergence(s, t, where=w, **with_temperature()),
    ),
    "init_masked_generation": (
        WIDER,
        lambda s, t: losses.masked_generation_loss(
            losses.init_masked_generation(KEY, 4, 6), KEY, s, t, masked_fraction=0.3
        ),
    ),
    "masked_generation_loss": (
        WIDER,
        lambda s, t: losses.masked_generation_loss(GENERATION, KEY, s, t, masked_fraction=0.3),
    ),
    "class_activation_maps": (
        MAPS[:1],
        lambda x: losses.class_activation_maps(x, UNEMBEDDINGS[0][:4]),
    ),
    "class_attention_loss": (MAPS, lambda s, t: losses.class_attention_loss(s, t, size=(2, 3))),
    "init_orthogonal_projector": (
        UNEQUAL,
        lambda s, t: losses.orthogonal_projection_loss(
            losses.init_orthogonal_projector(KEY, 6, 9), s, t
        ),
    ),
    "project_orthogonally": (UNEQUAL[:1], lambda x: losses.project_orthogonally(ORTHOGONAL, x)),
    "orthogonal_projection_loss": (
        UNEQUAL,
        lambda s, t: losses.orthogonal_projection_loss(ORTHOGONAL, s, t),
    ),
    "simple_recipe_loss": (
        UNEQUAL,
        lambda s, t: losses.simple_recipe_loss(RECIPE, s, t),
    ),
    # Gradients of a few hundred are rounded by more than a tolerance of 1e-5 allows.
    "whiten_features": (MAPS[:1], lambda x: 0.01 * losses.whiten_features(x)),
    "activation_boundary_loss": (MAPS, losses.activation_boundary_loss),
    "many_to_one_loss": (MAPS, lambda s, t: losses.many_to_one_loss(s, t[..., :2])),
    "init_factors": (
        MAPS[:1],
        lambda x: losses.extract_factors(losses.init_factors(KEY, 4, 3), x),
    ),
    "extract_factors": (MAPS[:1], lambda x: losses.extract_factors(FACTORS, x)),
    "init_paraphraser": (
        MAPS[:1],
        lambda x: losses.paraphraser_loss(losses.init_paraphraser(KEY, 4, 2), x),
    ),
    "paraphraser_loss": (MAPS[:1], lambda x: losses.paraphraser_loss(PARAPHRASER, x)),
    "factor_transfer_loss": (MAPS, losses.factor_transfer_loss),
    "contrastive_loss": (EMBEDDINGS, lambda s, t: losses.contrastive_loss(s, t, temperature=0.5)),
    "contrastive_bank_loss": (
        (*EMBEDDINGS, INDEX, NEGATIVES),
        lambda s, t, i, n: losses.contrastive_bank_loss(BANK, s, t, i, n, temperature=0.5),
    ),
    "similarity_preserving_loss": (UNEQUAL, losses.similarity_preserving_loss),
    "relational_distance_loss": (UNEQUAL, losses.relational_distance_loss),
    "relational_angle_loss": (UNEQUAL, losses.relational_angle_loss),
    "probabilistic_transfer_loss": (UNEQUAL, losses.probabilistic_transfer_loss),
    "correlation_congruence_loss": (UNEQUAL, losses.correlation_congruence_loss),
    "linear_cka": (UNEQUAL, losses.linear_cka),
    "linear_cka_loss": (UNEQUAL, losses.linear_cka_loss),
    "dist_inter_loss": (LOGITS, lambda s, t: losses.dist_inter_loss(s, t, **with_temperature())),
    "dist_intra_loss": (LOGITS, lambda s, t: losses.dist_intra_loss(s, t, **with_temperature())),
    "hidden_cosine_loss": (STATES, losses.hidden_cosine_loss),
    "hidden_mse_loss": (STATES, losses.hidden_mse_loss),
    "attention_map_loss": (ATTENTION, losses.attention_map_loss),
    "attention_divergence_loss": (
        ATTENTION,
        lambda s, t: losses.attention_divergence_loss(jax.nn.softmax(s), jax.nn.softmax(t)),
    ),
    "value_relation_loss": (VALUES, losses.value_relation_loss),
    "layers_loss": (
        STATES,
        lambda s, t: losses.layers_loss(
            losses.hidden_mse_loss,
            s.swapaxes(0, 1)[:2],
            t.swapaxes(0, 1),
            layers=losses.skip_layers(2, 4),
        ),
    ),
    "init_semantic_calibration": (
        (*MAPS, *WIDER),
        lambda a, b, c, d: losses.cross_layer_weights(
            losses.init_semantic_calibration(KEY, (4, 4), (4, 6), 5), [a, c], [b, d]
        ),
    ),
    "cross_layer_weights": (
        (MAPS[0], WIDER[1], MAPS[1], 2 * WIDER[1]),
        lambda a, b, c, d: losses.cross_layer_weights(CALIBRATION, [a, b], [c, d]),
    ),
    "semantic_calibration_loss": (
        (MAPS[0], WIDER[1], MAPS[1], 2 * WIDER[1]),
        lambda a, b, c, d: losses.semantic_calibration_loss(CALIBRATION, [a, b], [c, d]),
    ),
    "init_review": (
        (*MAPS, *WIDER),
        lambda a, b, c, d: losses.review_loss(
            losses.init_review(KEY, (4, 4), (4, 6), 5), [a, c], [b, d]
        ),
    ),
    "review_features": (
        (WIDER[0], WIDER[1]),
        lambda a, b: 0.1 * losses.review_features(REVIEW, [a, b], [(3, 3), (2, 4)])[0],
    ),
    "review_loss": (
        (*WIDER, *WIDER[::-1]),
        lambda a, b, c, d: losses.review_loss(REVIEW, [a, b], [2 * c, d]),
    ),
    "hierarchical_context_loss": (MAPS, losses.hierarchical_context_loss),
    "init_aligned_states": (
        STATES,
        lambda s, t: losses.aligned_states_loss(losses.init_aligned_states(KEY, 6, 6), s, t),
    ),
    "aligned_states_loss": (STATES, lambda s, t: losses.aligned_states_loss(ALIGNED, s, t)),
    "token_distillation_loss": (
        (*TOKENS, NEXT_TOKENS, TOKEN_MASK),
        lambda s, t, y, w: losses.token_distillation_loss(s, t, y, where=w),
    ),
    "next_tokens": (
        (TOKENS[0], NEXT_TOKENS, TOKEN_MASK),
        lambda z, y, w: losses.next_tokens(z, y, where=w)[0],
    ),
    "token_mean": ((TOKENS[0][..., 0], TOKEN_MASK), lambda v, w: losses.token_mean(v, where=w)),
    "margin_mse_loss": (LOGITS, losses.margin_mse_loss),
    "score_divergence_loss": (
        LOGITS,
        lambda s, t: losses.score_divergence_loss(s, t, **with_temperature()),
    ),
    "nested_loss": (
        EMBEDDINGS,
        lambda s, t: losses.nested_loss(losses.hidden_cosine_loss, s, t, dims=(2, 6)),
    ),
    "universal_logit_loss": (
        (*OTHER_VOCABULARY, TOKEN_MASK),
        lambda s, t, w: losses.universal_logit_loss(s, t, where=w),
    ),
    "align_tokens": (
        (STUDENT_ENDS, TEACHER_ENDS),
        lambda s, t: losses.align_tokens(
            *(jnp.stack([ends - 1, ends], -1) for ends in (s, t)),
        ),
    ),
    "rewards_to_go": (
        (TOKENS[0][..., 0], TOKENS[1][..., 0], TOKEN_MASK),
        lambda s, t, w: losses.rewards_to_go(s, t, where=w),
    ),
    "sequence_reverse_kl_loss": (
        (TOKENS[0][..., 0], TOKENS[1][..., 0], TOKEN_MASK),
        lambda s, t, w: losses.sequence_reverse_kl_loss(s, t, where=w, baseline=0.5),
    ),
    "fused_linear_kl_divergence": (
        UNEQUAL,
        lambda s, t: losses.fused_linear_kl_divergence(
            s, UNEMBEDDINGS[0], t, UNEMBEDDINGS[1], chunk_size=3, **with_temperature()
        ),
    ),
    "fused_linear_reverse_kl_divergence": (
        UNEQUAL,
        lambda s, t: losses.fused_linear_reverse_kl_divergence(
            s, UNEMBEDDINGS[0], t, UNEMBEDDINGS[1], chunk_size=3, **with_temperature()
        ),
    ),
    "fused_linear_jensen_shannon_divergence": (
        UNEQUAL,
        lambda s, t: losses.fused_linear_jensen_shannon_divergence(
            s, UNEMBEDDINGS[0], t, UNEMBEDDINGS[1], chunk_size=3, **with_temperature(beta=0.3)
        ),
    ),
    "fused_linear_distillation_loss": (
        (*UNEQUAL, LABELS),
        lambda s, t, y: losses.fused_linear_distillation_loss(
            s, UNEMBEDDINGS[0], t, UNEMBEDDINGS[1], y, chunk_size=3
        ),
    ),
    "fused_linear_cross_entropy": (
        (UNEQUAL[0], LABELS),
        lambda s, y: losses.fused_linear_cross_entropy(s, UNEMBEDDINGS[0], y, chunk_size=3),
    ),
    "fused_linear_sparse_kl_divergence": (
        (UNEQUAL[0], TOKENS[1][:, 0]),
        lambda s, t: losses.fused_linear_sparse_kl_divergence(
            s, UNEMBEDDINGS[0], losses.top_k(t, k=2), chunk_size=3
        ),
    ),
}
# These take and return integers or state; the tests of their modules cover them.
NOT_CASES = {"uniform_layers", "skip_layers", "last_layers", "custom_layers"}
NOT_CASES |= {"Interpolation", "init_interpolation", "update_interpolation"}
NOT_CASES |= {"TopK", "SampledClasses", "sample_classes", "LinearHead"}
NOT_CASES |= {"init_curriculum_temperature"}
# This one raises or passes, outside of jit.
NOT_CASES |= {"check_logits"}
NOT_CASES |= {"ContrastiveBank", "init_bank", "draw_negatives", "calibrate_bank", "update_bank"}

LOSS_ENDINGS = ("_loss", "_divergence", "_distance", "_entropy")


def test_every_function_is_covered():
    assert set(CASES) | NOT_CASES == set(losses.__all__) and not set(CASES) & NOT_CASES


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_jit_vmap_pmap_and_sharding_equal_eager(name):
    arrays, function = CASES[name]
    floating = tuple(
        i for i, array in enumerate(arrays) if jnp.issubdtype(array.dtype, jnp.floating)
    )

    def value_and_gradient(*arrays):
        """Returns the value, and the gradient of a sum with different weights of examples."""

        def weighted_total(*arrays):
            value = function(*arrays)
            return (value * jnp.arange(1.0, value.size + 1).reshape(value.shape)).sum(), value

        if not floating:
            return function(*arrays)
        (_, value), gradient = jax.value_and_grad(weighted_total, floating, has_aux=True)(*arrays)
        return value, gradient

    eager = value_and_gradient(*arrays)
    compiled = jax.jit(value_and_gradient)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    chex.assert_tree_all_finite(eager)
    chex.assert_trees_all_close(compiled(*arrays), eager, **tolerance)

    mesh = jax.make_mesh((B,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(arrays, jax.NamedSharding(mesh, jax.P("batch")))
    chex.assert_trees_all_close(compiled(*sharded), eager, **tolerance)

    second = tuple(array[::-1] * 0.5 if i in floating else array for i, array in enumerate(arrays))
    stacked = jax.tree.map(lambda *pair: jnp.stack(pair), arrays, second)
    expected = jax.tree.map(lambda *pair: jnp.stack(pair), eager, compiled(*second))
    chex.assert_trees_all_close(jax.vmap(compiled)(*stacked), expected, **tolerance)
    chex.assert_trees_all_close(jax.pmap(value_and_gradient)(*stacked), expected, **tolerance)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    [name for name in CASES if name.endswith(LOSS_ENDINGS)],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_of_narrow_arrays_are_float32_with_a_value_per_example(name, dtype):
    if name.startswith("fused"):
        pytest.skip("states and kernel share a dtype: tests/losses/test_fused.py")
    arrays, function = CASES[name]
    narrow = [
        array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array
        for array in arrays
    ]

    def total(first):
        value = function(first, *narrow[1:])
        return value.sum(), value

    (_, value), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(narrow[0])
    assert value.dtype == jnp.float32 and value.shape[0] == B
    assert gradient.dtype == dtype
    chex.assert_tree_all_finite((value, gradient))
    np.testing.assert_allclose(value, function(*arrays), rtol=0.2, atol=0.1)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    [name for name in CASES if name.endswith(LOSS_ENDINGS)],
)
def test_no_examples_give_no_values(name):
    arrays, function = CASES[name]
    assert function(*(array[:0] for array in arrays)).shape[0] == 0


def test_arrays_are_positional_and_options_keyword_only():
    for name in losses.__all__:
        for parameter in inspect.signature(getattr(losses, name)).parameters.values():
            assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY), name
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                assert parameter.default is parameter.empty, f"{name}: {parameter.name}"


NO_DEFAULT = {
    # The temperature of the loss that follows.
    ("temperature_softmax", "temperature"),
    ("ensemble_logits", "temperature"),
    ("calibrate_bank", "temperature"),
    # Papers choose these by task.
    ("jensen_shannon_divergence", "beta"),
    ("fused_linear_jensen_shannon_divergence", "beta"),
    ("decoupled_loss", "non_target_weight"),
    ("virtual_teacher_logits", "correct"),
    ("masked_generation_loss", "masked_fraction"),
    ("enhanced_target_loss", "exponent"),
    ("class_attention_loss", "size"),
    ("alpha_beta_divergence", "alpha"),
    ("alpha_beta_divergence", "beta"),
    ("renyi_divergence", "order"),
    ("refined_logits_loss", "correlation_weight"),
    ("sparse_jensen_shannon_divergence", "beta"),
    # They change with training.
    ("interpolated_logits", "fraction"),
    ("reverse_gradient", "strength"),
    ("curriculum_temperature", "strength"),
    ("instance_temperature", "strength"),
}
FIXED_BY_A_PAPER = {
    ("normalized_loss", "temperature"): 1.0,
    ("normalized_loss", "gamma"): 1.5,
    ("enhanced_target_loss", "temperature"): 1.0,
    ("channel_wise_divergence", "temperature"): 1.0,
    ("activation_boundary_loss", "margin"): 1.0,
    ("contrastive_loss", "temperature"): 0.07,
    ("contrastive_bank_loss", "temperature"): 0.07,
    ("update_bank", "momentum"): 0.5,
    ("label_smoothing_loss", "smoothing"): 0.1,
    ("decoupled_loss", "target_weight"): 1.0,
    ("attention_transfer_map", "power"): 2,
    ("attention_transfer_loss", "power"): 2,
    ("attention_transfer_mse_loss", "power"): 2,
    ("init_variational_information", "variance"): 5.0,
    ("correlation_congruence_loss", "gamma"): 0.4,
    ("correlation_congruence_loss", "order"): 2,
    ("universal_logit_loss", "temperature"): 1.0,
    ("skewed_kl_divergence", "skew"): 0.1,
    ("skewed_reverse_kl_divergence", "skew"): 0.1,
    ("adaptive_kl_divergence", "head"): 0.5,
    ("multi_level_loss", "temperatures"): (2.0, 3.0, 4.0, 5.0, 6.0),
    ("init_interpolation", "start"): 0.4,
    ("update_interpolation", "start"): 0.4,
    ("update_interpolation", "end"): 1.0,
    ("update_interpolation", "rate"): 5e-4,
    ("update_interpolation", "decay"): 0.99,
    ("curriculum_temperature", "lowest"): 1.0,
    ("curriculum_temperature", "span"): 20.0,
    ("instance_temperature", "lowest"): 1.0,
    ("instance_temperature", "span"): 20.0,
    ("simple_recipe_loss", "power"): 4.0,
    ("transformed_teacher_loss", "weighted"): False,
    ("sample_classes", "proposal_temperature"): 1.0,
    ("rewards_to_go", "length_normalized"): True,
    ("sequence_reverse_kl_loss", "length_normalized"): True,
    ("sequence_reverse_kl_loss", "baseline"): 0.0,
    ("fused_linear_distillation_loss", "beta"): 0.0,
}
# Arrays, sizes and axes are not hyper-parameters.
NOT_HYPERPARAMETERS = {"where", "weights", "labels", "layers", "count", "axis", "chunk_size"}
NOT_HYPERPARAMETERS |= {"num_classes", "num_examples", "negatives", "dims", "k"}
NOT_HYPERPARAMETERS |= {"axis_name", "bias", "softcap", "is_embedding", "use_pallas"}


def test_defaults_follow_one_rule():
    expected = {"temperature": 2.0, "alpha": 0.5}
    found = set()
    for name in losses.__all__:
        for parameter in inspect.signature(getattr(losses, name)).parameters.values():
            case = name, parameter.name
            is_option = parameter.kind is parameter.KEYWORD_ONLY
            if not is_option or parameter.name in NOT_HYPERPARAMETERS:
                continue
            found.add(case)
            default = FIXED_BY_A_PAPER.get(case, expected.get(parameter.name))
            if case in NO_DEFAULT:
                assert parameter.default is parameter.empty, case
            else:
                assert default is not None and parameter.default == default, case
    assert found >= NO_DEFAULT | set(FIXED_BY_A_PAPER)


def test_losses_on_logits_need_no_options():
    for name in ("soft_cross_entropy", "kl_divergence", "reverse_kl_divergence"):
        loss = getattr(losses, name)
        np.testing.assert_array_equal(loss(*LOGITS), loss(*LOGITS, temperature=2.0))


ONE_LOGIT = LOGITS[0][:, :1], LOGITS[1][:, :1]
OF_CLASSES = {
    "temperature_softmax": lambda s, t: losses.temperature_softmax(s, temperature=2.0),
    "soft_cross_entropy": losses.soft_cross_entropy,
    "universal_logit_loss": losses.universal_logit_loss,
    "kl_divergence": losses.kl_divergence,
    "reverse_kl_divergence": losses.reverse_kl_divergence,
    "jensen_shannon_divergence": lambda s, t: losses.jensen_shannon_divergence(s, t, beta=0.3),
    "dist_inter_loss": losses.dist_inter_loss,
    "dist_intra_loss": losses.dist_intra_loss,
    "hard_cross_entropy": lambda s, t: losses.hard_cross_entropy(s, 0 * LABELS),
    "label_smoothing_loss": lambda s, t: losses.label_smoothing_loss(s, 0 * LABELS),
    "distillation_loss": lambda s, t: losses.distillation_loss(s, t, 0 * LABELS),
    "decoupled_loss": lambda s, t: losses.decoupled_loss(s, t, 0 * LABELS, non_target_weight=8.0),
    "normalized_loss": lambda s, t: losses.normalized_loss(s, t, 0 * LABELS),
    "enhanced_target_loss": lambda s, t: losses.enhanced_target_loss(
        s, t, 0 * LABELS, exponent=1.0
    ),
}


@pytest.mark.parametrize("name", OF_CLASSES)
def test_one_logit_of_a_sigmoid_raises(name):
    """Its softmax is 1, so that the loss would be 0 and nothing would be learnt."""
    with pytest.raises(ValueError, match="have one class, .* pass jnp.concatenate") as error:
        jax.eval_shape(OF_CLASSES[name], *ONE_LOGIT)
    assert len(str(error.value)) <= 300


def test_the_axis_of_classes_decides_how_many_there_are():
    student, teacher = (logits[:, :, None] for logits in LOGITS)
    assert losses.kl_divergence(student, teacher, axis=1).shape == (B, 1)
    assert losses.kl_divergence(*(logits[:1] for logits in LOGITS)).shape == (1,)
    with pytest.raises(ValueError, match="have one class"):
        losses.kl_divergence(student, teacher)


def test_a_single_logit_may_be_regressed():
    assert (losses.logit_mse_loss(*ONE_LOGIT) > 0).all()
