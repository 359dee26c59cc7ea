"""Compares the losses with recorded results of public PyTorch implementations.

The recorded numbers are results of an implementation, in float64, on the inputs of its row: its
loss over the batch, and the norm of the loss's gradient with respect to the student. Where a
convention differs, the row's expression converts ours to theirs, and a comment names the
difference. The packages themselves are not needed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses

LABELS = np.array([0, 3, 1, 3])
CLASS_WEIGHTS = np.array([0.5, 1.0, 2.0, 4.0, 1.5], np.float32)
TOKENS = np.array([[4, 0, -100], [2, -100, -100]])
LIGER_LABELS = np.array([4, 0, -100, 2, 6, -100])
LIGER_MASK = LIGER_LABELS != -100
LENGTHS = np.array([3, 2], np.float32)
VALID = np.array([[True, True, True], [True, True, False]])
POSITIVES = np.array([2, 6, 4, 0])
NEGATIVES = np.array([[0, 5, 7], [1, 3, 0], [7, 2, 5], [3, 1, 6]])


class Row(NamedTuple):
    """Results of a public implementation; `inputs` are shapes, the student's array first."""

    source: str
    inputs: tuple[tuple[int, ...], ...]
    loss: Callable
    value: float
    gradient: float
    scale: float = 1.0


LOGITS = (4, 5), (4, 5)
TOKEN_LOGITS = (2, 3, 7), (2, 3, 7)
ENSEMBLE = (4, 5), (3, 4, 5)
LAST_LAYERS = (6, 4), (7, 4), (6, 3), (7, 3)
MAPS = (3, 4, 4, 6), (3, 4, 4, 6)
WIDER_MAPS = (3, 4, 4, 6), (3, 4, 4, 8)
FLOWS = (3, 4, 4, 6), (3, 4, 4, 5), (3, 4, 4, 6), (3, 4, 4, 5)
EMBEDDINGS = (4, 6), (4, 8)
BANK = (4, 6), (4, 6), (8, 6), (8, 6)
STATES = (2, 3, 4), (2, 3, 4)
SCORES = (2, 2, 3, 3), (2, 2, 3, 3)
VALUES = (2, 2, 3, 4), (2, 2, 3, 5)
LAYERS = (2, 5, 5, 2), (2, 3, 3, 3), (2, 5, 5, 2), (2, 4, 4, 3), (2, 2, 2, 4)
REVIEWED = (3, 8, 8, 2), (3, 4, 4, 3), (3, 8, 8, 4), (3, 6, 6, 5)
REVIEWED += (1, 1, 2, 3), (1, 1, 3, 3), (3, 3, 3, 4), (3, 3, 3, 5), (1, 1, 6, 2), (2,)
PARAPHRASER = (3, 3, 4, 4), (3, 3, 4, 3), (3, 3, 3, 3), (3, 3, 3, 3), (3, 3, 3, 4), (3, 3, 4, 4)
PROJECTORS = (2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (3, 4)


def draw(*shapes, scale=1.0):
    """Draws normal numbers that float32 represents exactly, by one generator in order of shapes."""
    rng = np.random.default_rng(0)
    return [np.float32(scale) * rng.normal(size=shape).astype(np.float32) for shape in shapes]


def entropy(logits, temperature):
    """Computes the entropy of a softened distribution: cross-entropy minus divergence."""
    return losses.soft_cross_entropy(logits, logits, temperature=temperature) / temperature**2


def mean(loss, *arguments, **options):
    """Returns the mean over the batch of a loss on student, teacher and further arguments."""
    return lambda *inputs: loss(*inputs, *arguments, **options).mean()


def trl(beta):
    # Without T². For logits [B, C] their "batchmean" is the mean over B.
    return lambda s, t: (
        losses.jensen_shannon_divergence(s, t, temperature=2.0, beta=beta).mean() / 4
    )


def liger(beta):
    def loss(states, kernel, teacher_states, teacher_kernel):
        # Their weights are [V, D], ours [D, V]. Without T²; the mean is over the tokens that count.
        values = losses.fused_linear_jensen_shannon_divergence(
            states,
            kernel.T,
            teacher_states,
            teacher_kernel.T,
            temperature=2.0,
            beta=beta,
            where=LIGER_MASK,
        )
        return losses.token_mean(values, where=LIGER_MASK) / 4

    return loss


def liger_mixed(states, kernel, teacher_states, teacher_kernel):
    hard = losses.hard_cross_entropy(states @ kernel.T, np.where(LIGER_MASK, LIGER_LABELS, 0))
    soft = liger(0.5)(states, kernel, teacher_states, teacher_kernel)
    return 0.3 * losses.token_mean(hard, where=LIGER_MASK) + 0.7 * soft


def weighted_soft_labels(student, teacher):
    weights = jax.lax.stop_gradient(losses.example_weights(student, teacher, LABELS))
    return 2.25 * (weights * losses.soft_cross_entropy(student, teacher, temperature=2.0)).mean()


def standardized(student, teacher):
    # Their deviation divides by C − 1 = 4, ours by C = 5, which amounts to another temperature; the
    # factor is T² of theirs.
    student, teacher = losses.standardize_logits(student), losses.standardize_logits(teacher)
    return losses.kl_divergence(student, teacher, temperature=4 * np.sqrt(5 / 4)).mean() * 4 / 5


def teacher_free(student):
    # Their code uses the teacher's probabilities as logits, softens only these by T, and takes the
    # mean over classes as well.
    teacher = jnp.exp(losses.virtual_teacher_logits(LABELS, num_classes=5, correct=0.99)) / 20
    return losses.kl_divergence(student, teacher, temperature=1.0).mean() / 5


def confidence_aware(student, teacher, teacher_logits):
    # Theirs also divides the weighted sum by the number of teachers.
    weights = losses.teacher_weights(2 * teacher_logits, LABELS)
    terms = [losses.hint_loss(*pair) for pair in zip(student, teacher, strict=True)]
    return losses.weighted_sum(terms, weights=weights).mean() / 3


def variational(student, teacher, kernel, bias, raw_variance):
    params = {"kernel": kernel, "bias": bias, "raw_variance": raw_variance}
    return losses.variational_information_loss(params, student, teacher).mean()


def probabilistic(student, teacher):
    """Adds the pair of an example with itself, of similarity 1, and averages over all pairs."""

    def probability_of_others(x):
        similarities = (1 + jnp.matmul(x, x.T, precision="highest")) / 2
        others = similarities.sum(1) - jnp.diagonal(similarities)
        return others / (1 + others)

    unit = [x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher)]
    q, p = (probability_of_others(x) for x in unit)
    own_pair = p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q))
    return (own_pair + p * losses.probabilistic_transfer_loss(student, teacher)).mean() / len(
        student
    )


def bank_of(student_rows, teacher_rows):
    unit = (
        rows / jnp.linalg.norm(rows, axis=1, keepdims=True) for rows in (student_rows, teacher_rows)
    )
    return losses.ContrastiveBank(*unit, jnp.float32(0), jnp.float32(0))


def contrast(student, teacher, *rows):
    batch = student, teacher, POSITIVES, NEGATIVES
    return losses.contrastive_bank_loss(bank_of(*rows), *batch, temperature=0.5).mean()


def contrast_first_batch(student, teacher, *rows):
    batch = student, teacher, POSITIVES, NEGATIVES
    bank = jax.lax.stop_gradient(losses.calibrate_bank(bank_of(*rows), *batch, temperature=0.5))
    return losses.contrastive_bank_loss(bank, *batch, temperature=0.5).mean()


def masked_mean(loss):
    return lambda s, t: losses.token_mean(loss(s, t), where=VALID)


def value_relation(where):
    # In their arrays the head axis precedes the token axis.
    return lambda s, t: losses.value_relation_loss(
        s.swapaxes(1, 2), t.swapaxes(1, 2), where=where
    ).mean()


def attention_relation(student, teacher, where=None):
    keys = True if where is None else where[:, None, None, :]
    weights = (jax.nn.softmax(jnp.where(keys, scores, -jnp.inf)) for scores in (student, teacher))
    return losses.attention_divergence_loss(*weights, where=where).mean()


def scores_of_valid_tokens(student, teacher):
    # Theirs is the mean over the entries of the whole batch, ours a mean for each example, of 3 × 3
    # and 2 × 2 entries.
    values = losses.attention_map_loss(
        student, teacher, where=VALID[:, None, :, None] & VALID[:, None, None, :]
    )
    return (values * LENGTHS**2).sum() / (LENGTHS**2).sum()


def scores_of_valid_keys(student, teacher):
    # Their code counts masked keys in the mean, as entries without a difference.
    return (
        losses.attention_map_loss(student, teacher, where=VALID[:, None, None, :]) * LENGTHS / 3
    ).mean()


def tokens_as_positions(*states):
    # [B, N, D] as maps of N × 1 positions. Their mean is also over the 4 × 5 entries of the matrix.
    return losses.flow_of_solution_procedure_loss(*(x[:, :, None] for x in states)).mean() / 20


def semantic_calibration(first, second, *arguments):
    # Without their networks: with queries and keys of 0 all layers have the same weight, and
    # projections are 1×1 convolutions.
    params = losses.init_semantic_calibration(jax.random.key(0), (2, 3), (2, 3, 4), features=1)
    projectors = [
        {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])} for kernel in arguments[3:]
    ]
    params = jax.tree.map(jnp.zeros_like, params) | {"projectors": [projectors[:3], projectors[3:]]}
    return losses.semantic_calibration_loss(params, [first, second], arguments[:3]).mean()


def masked_generation(student, teacher, *arrays):
    params = {"projector": dict(zip(("kernel", "bias"), arrays[:2], strict=True))}
    for name, layer in (("first", arrays[2:4]), ("second", arrays[4:])):
        params[name] = dict(zip(("kernel", "bias"), layer, strict=True))
    # Without a mask, since the random numbers are not theirs.
    return losses.masked_generation_loss(
        params, jax.random.key(0), student, teacher, masked_fraction=0.0
    ).mean()


def review(first, second, first_teacher, second_teacher, *arrays):
    inputs, outputs = arrays[:2], arrays[2:4]
    params = losses.init_review(jax.random.key(0), (2, 3), (4, 5), 3)
    for block, input_kernel, output_kernel in zip(params, inputs, outputs, strict=True):
        block["input"]["kernel"], block["output"]["kernel"] = input_kernel, output_kernel
    params[0]["attention"] = {"kernel": arrays[4], "bias": arrays[5]}
    return losses.review_loss(params, [first, second], [first_teacher, second_teacher]).mean()


def paraphraser(teacher, *kernels):
    layers = [{"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])} for kernel in kernels]
    return losses.paraphraser_loss({"encoder": layers[:3], "decoder": layers[3:]}, teacher).mean()


ROWS = [
    # Logits. Unless a comment says otherwise, both have T² and the mean over the batch.
    Row(
        "RepDistiller DistillKL, mdistiller kd_loss",
        LOGITS,
        mean(losses.kl_divergence, temperature=4.0),
        1.842144516,
        0.4114447763,
        2,
    ),
    Row(
        # Their alpha is the weight of the hard term, and the soft term is a divergence.
        "torchdistill KDLoss",
        LOGITS,
        lambda s, t: (
            losses.distillation_loss(s, t, LABELS, temperature=4.0, alpha=0.7)
            - 0.7 * 16 * entropy(t, 4.0)
        ).mean(),
        1.929202114,
        0.3476740956,
        2,
    ),
    Row(
        # Their mean of the divergence is also over classes, as in the teacher assistant's code.
        "knowledge-distillation-pytorch loss_fn_kd",
        LOGITS,
        lambda s, t: (
            0.9 * losses.kl_divergence(s, t, temperature=4.0) / 5
            + 0.1 * losses.hard_cross_entropy(s, LABELS)
        ).mean(),
        0.544819664,
        0.09639230266,
        2,
    ),
    Row(
        # Without T².
        "TextBrewer kd_ce_loss",
        LOGITS,
        lambda s, t: losses.soft_cross_entropy(s, t, temperature=4.0).mean() / 16,
        1.678175467,
        0.02571529852,
        2,
    ),
    Row(
        # Logits are divided by T.
        "TextBrewer kd_mse_loss",
        LOGITS,
        lambda s, t: losses.logit_mse_loss(s, t).mean() / 16,
        0.3169453584,
        0.06294296609,
        2,
    ),
    Row(
        # Theirs averages the teachers' logits; `losses.ensemble_logits` averages probabilities.
        "TextBrewer MultiTeacherDistiller",
        ENSEMBLE,
        lambda s, t: losses.soft_cross_entropy(s, t.mean(0), temperature=4.0).mean() / 16,
        1.652553547,
        0.01869505088,
        2,
    ),
    Row("TRL generalized_jsd_loss, beta 0", LOGITS, trl(0), 0.4085030835, 0.0926455024, 2),
    Row("TRL generalized_jsd_loss, beta 0.3", LOGITS, trl(0.3), 0.07809025109, 0.01645325299, 2),
    Row("TRL generalized_jsd_loss, beta 0.5", LOGITS, trl(0.5), 0.09133934721, 0.01919411306, 2),
    Row("TRL generalized_jsd_loss, beta 1", LOGITS, trl(1), 0.3883058523, 0.08964852207, 2),
    Row(
        # With labels theirs is the mean over the tokens that count, without T².
        "TRL generalized_jsd_loss, labels",
        TOKEN_LOGITS,
        lambda s, t: losses.token_mean(
            losses.jensen_shannon_divergence(s, t, temperature=2.0, beta=0.3) / 4,
            where=TOKENS != -100,
        ),
        0.0557743452,
        0.01724924193,
        2,
    ),
    Row(
        # Without labels their "batchmean" is the sum over the tokens of a sequence.
        "TRL generalized_jsd_loss, no labels",
        TOKEN_LOGITS,
        lambda s, t: (
            losses.jensen_shannon_divergence(s, t, temperature=2.0, beta=0.3).sum(1).mean() / 4
        ),
        0.3568126859,
        0.0474399206,
        2,
    ),
    Row("Liger LigerFusedLinearJSDLoss, beta 0", LAST_LAYERS, liger(0.0), 0.56643385, 0.2382956645),
    Row(
        "Liger LigerFusedLinearJSDLoss, beta 0.3",
        LAST_LAYERS,
        liger(0.3),
        0.09816072689,
        0.0342466032,
    ),
    Row(
        "Liger LigerFusedLinearJSDLoss, beta 1", LAST_LAYERS, liger(1.0), 0.4646374506, 0.1930307192
    ),
    Row(
        "Liger LigerFusedLinearJSDLoss, hard 0.3 and soft 0.7",
        LAST_LAYERS,
        liger_mixed,
        1.387815442,
        0.4198121373,
    ),
    Row(
        "mdistiller dkd_loss",
        LOGITS,
        mean(losses.decoupled_loss, LABELS, temperature=4.0, non_target_weight=8.0),
        15.78284067,
        3.690256869,
        2,
    ),
    Row(
        # Since the commit that excludes the label from the other classes.
        "cls_KD NKDLoss",
        LOGITS,
        mean(losses.normalized_loss, LABELS, temperature=2.0),
        9.895349039,
        0.6110081252,
        2,
    ),
    Row("cls_KD WSLDLoss", LOGITS, weighted_soft_labels, 9.13710867, 0.5369205921, 2),
    Row(
        # Without the cross-entropy that theirs adds.
        "BalancedKnowledgeDistillation BKDLoss",
        LOGITS,
        mean(losses.kl_divergence, temperature=2.0, weights=CLASS_WEIGHTS[None]),
        2.307101097,
        0.4572200197,
        2,
    ),
    Row("logit-standardization-KD kd_loss", LOGITS, standardized, 0.8892732565, 0.1016081167, 2),
    Row(
        "torch CrossEntropyLoss(label_smoothing)",
        LOGITS[:1],
        mean(losses.label_smoothing_loss, LABELS, smoothing=0.1),
        2.162719752,
        0.4543225374,
        2,
    ),
    Row(
        # Theirs spreads 0.1 over the other C − 1 classes, ours 0.1 · C / (C − 1) over all.
        "Teacher-free-Knowledge-Distillation loss_label_smoothing",
        LOGITS[:1],
        mean(losses.label_smoothing_loss, LABELS, smoothing=0.125),
        2.170315562,
        0.4448082129,
        2,
    ),
    Row(
        "Teacher-free-Knowledge-Distillation loss_kd_regularization",
        LOGITS[:1],
        teacher_free,
        0.1647770126,
        0.04725854273,
        2,
    ),
    Row(
        # Theirs also divides by the sum of the weights of the batch's labels.
        "torch CrossEntropyLoss(weight)",
        LOGITS[:1],
        lambda s: (
            losses.hard_cross_entropy(s, LABELS, weights=CLASS_WEIGHTS).sum()
            / CLASS_WEIGHTS[LABELS].sum()
        ),
        2.745222736,
        0.6803782001,
        2,
    ),
    Row("CA-MKD", ((3, 4, 6), (3, 4, 6), (3, 4, 5)), confidence_aware, 0.4102630643, 0.1004572956),
    Row(
        "DIST_KD logit_relation",
        LOGITS,
        mean(losses.dist_inter_loss, temperature=1.0),
        1.013231731,
        0.2054450259,
        2,
    ),
    Row(
        "DIST_KD class_relation",
        LOGITS,
        mean(losses.dist_intra_loss, temperature=1.0),
        0.9353120522,
        0.2208587339,
        2,
    ),
    Row(
        "torchdistill DISTLoss, beta",
        LOGITS,
        mean(losses.dist_inter_loss, temperature=4.0),
        17.87339092,
        2.074395607,
        2,
    ),
    Row(
        "torchdistill DISTLoss, gamma",
        LOGITS,
        mean(losses.dist_intra_loss, temperature=4.0),
        14.45626513,
        2.72435853,
        2,
    ),
    # Features, in their order of axes B C H W.
    Row("RepDistiller HintLoss", MAPS, mean(losses.hint_loss), 1.973794745, 0.1655711808),
    Row(
        "RepDistiller Attention, torchdistill ATLoss by code",
        WIDER_MAPS,
        mean(losses.attention_transfer_mse_loss),
        0.01974742858,
        0.007183373367,
    ),
    Row(
        "torchdistill ATLoss by paper",
        WIDER_MAPS,
        mean(losses.attention_transfer_loss),
        0.5570461739,
        0.1049098304,
    ),
    Row(
        "RepDistiller NSTLoss",
        WIDER_MAPS,
        mean(losses.neuron_selectivity_loss),
        0.276556274,
        0.02636191962,
    ),
    Row(
        # Theirs is the mean over the 6 × 5 entries.
        "RepDistiller FSP",
        FLOWS,
        lambda *maps: losses.flow_of_solution_procedure_loss(*maps).mean() / 30,
        0.1091691976,
        0.01831591569,
    ),
    Row(
        "TextBrewer fsp_loss",
        ((2, 3, 4), (2, 3, 5)) * 2,
        tokens_as_positions,
        0.5383933181,
        0.2096725716,
    ),
    Row(
        "mdistiller vid_loss of a 1x1 convolution, torchdistill VIDLoss",
        (*WIDER_MAPS, (6, 8), (8,), (8,)),
        variational,
        8.934124411,
        1.291960865,
    ),
    # Relations.
    Row(
        "RepDistiller Similarity",
        EMBEDDINGS,
        mean(losses.similarity_preserving_loss),
        0.1126501911,
        0.1283001921,
    ),
    Row(
        "RKD RkdDistance",
        EMBEDDINGS,
        mean(losses.relational_distance_loss),
        0.03532210255,
        0.03316113184,
    ),
    Row(
        "RKD RKdAngle", EMBEDDINGS, mean(losses.relational_angle_loss), 0.05225801873, 0.04790865689
    ),
    Row(
        "torchdistill RKDLoss, RepDistiller RKDLoss, 25 and 50",
        EMBEDDINGS,
        lambda s, t: (
            25 * losses.relational_distance_loss(s, t) + 50 * losses.relational_angle_loss(s, t)
        ).mean(),
        3.4959535,
        3.194836666,
    ),
    Row(
        "probabilistic_kt and RepDistiller cosine_similarity_loss, eps 0",
        EMBEDDINGS,
        probabilistic,
        0.01622475392,
        0.02804374866,
    ),
    Row(
        "FaceX-Zoo CC",
        EMBEDDINGS,
        mean(losses.correlation_congruence_loss),
        0.03282485099,
        0.03652213338,
    ),
    Row(
        # Theirs is the distance, not its square, over the number of pairs. The caller normalises.
        "torchdistill CCKDLoss, of normalised features",
        EMBEDDINGS,
        lambda s, t: jnp.sqrt(losses.correlation_congruence_loss(s, t).mean()) / 4,
        0.04529407452,
        0.02519792446,
    ),
    Row(
        "feature_space_linear_cka, as in the paper's notebook",
        EMBEDDINGS,
        losses.linear_cka,
        0.7193548138,
        0.3436995742,
    ),
    # CRD, where embeddings and rows are scaled to length 1 first.
    Row(
        "RepDistiller ContrastMemory and ContrastLoss, Z = 1",
        BANK,
        contrast,
        9.585063057,
        0.772668615,
    ),
    Row(
        "RepDistiller ContrastMemory and ContrastLoss, first batch",
        BANK,
        contrast_first_batch,
        5.298610342,
        0.5085786343,
    ),
    Row(
        "RepDistiller ContrastLoss, of a batch with itself",
        ((4, 6), (4, 6)),
        mean(losses.contrastive_loss, temperature=0.5),
        4.167231699,
        0.8266548885,
    ),
    # Transformers.
    Row("TextBrewer hid_mse_loss", STATES, mean(losses.hidden_mse_loss), 1.727162073, 0.5365261835),
    Row(
        "TextBrewer hid_mse_loss, mask",
        STATES,
        masked_mean(losses.hidden_mse_loss),
        1.568881794,
        0.5601574411,
    ),
    Row("TextBrewer cos_loss", STATES, mean(losses.hidden_cosine_loss), 1.249948764, 0.2962935368),
    Row(
        "TextBrewer cos_loss, mask",
        STATES,
        masked_mean(losses.hidden_cosine_loss),
        1.261573899,
        0.3327014449,
    ),
    Row(
        # Only the first token.
        "TextBrewer pkd_loss",
        STATES,
        lambda s, t: 2 * losses.hidden_cosine_loss(s[:, 0], t[:, 0]).mean(),
        2.573592388,
        1.359452729,
    ),
    Row(
        # Their mean is also over the 4 features.
        "PKD-for-BERT-Model-Compression patience_loss",
        STATES,
        lambda s, t: 2 * losses.hidden_cosine_loss(s, t).mean() / 4,
        0.624974382,
        0.1481467684,
    ),
    Row("TextBrewer att_mse_loss, mask", SCORES, scores_of_valid_tokens, 1.984702807, 0.5525747853),
    Row("TinyBERT task_distill", SCORES, scores_of_valid_keys, 1.737577249, 0.4393906449),
    Row("minilmv2.bb, values", VALUES, value_relation(None), 0.2895895106, 0.1255684039),
    Row("minilmv2.bb, values, mask", VALUES, value_relation(VALID), 0.2528406153, 0.1361464577),
    Row("minilmv2.bb, queries and keys", SCORES, attention_relation, 0.3029677744, 0.1181752835),
    Row(
        "minilmv2.bb, queries and keys, mask",
        SCORES,
        lambda s, t: attention_relation(s, t, VALID),
        0.1228781679,
        0.08361953757,
    ),
    Row(
        "SemCKD SelfA and SemCKDLoss, uniform attention",
        LAYERS + PROJECTORS,
        semantic_calibration,
        2.592692879,
        0.0621012464,
    ),
    # Maps. All have the mean over the batch.
    Row(
        "torch adaptive_avg_pool2d, squared",
        MAPS[:1],
        lambda maps: (losses.pool_to(maps, (3, 2)) ** 2).mean(),
        0.2773787268,
        0.05852594645,
    ),
    Row(
        "TorchDistiller CriterionCWD, channel and kl",
        MAPS,
        mean(losses.channel_wise_divergence, temperature=4.0),
        0.9296565269,
        0.08048081012,
    ),
    Row(
        "MGD FeatureLoss, lambda 0 and alpha 1",
        ((3, 4, 4, 6), (3, 4, 4, 5), (6, 5), (5,), (3, 3, 5, 5), (5,), (3, 3, 5, 5), (5,)),
        masked_generation,
        125082.0001,
        45406.33226,
    ),
    Row(
        "CAT-KD CAT_loss, normalised",
        MAPS,
        mean(losses.class_attention_loss, size=3),
        0.2065300095,
        0.02044234662,
    ),
    Row(
        "ReviewKD hcl, mdistiller hcl_loss",
        ((3, 8, 8, 6), (3, 8, 8, 6)),
        mean(losses.hierarchical_context_loss),
        1.258448598,
        0.05295948137,
    ),
    Row(
        "ReviewKD ABF and hcl",
        REVIEWED,
        review,
        2.482893656,
        0.03925759065,
    ),
    Row(
        "Factor-Transfer-pytorch FT and L1Loss",
        MAPS,
        mean(losses.factor_transfer_loss),
        0.1156842282,
        0.004731167471,
    ),
    Row(
        # The kernels of their transposed convolutions are ours, flipped.
        "Factor-Transfer-pytorch Paraphraser",
        ((3, 4, 4, 4), *PARAPHRASER),
        paraphraser,
        367.5254497,
        166.9447612,
    ),
    Row(
        # Their sum over the batch, divided by its size.
        "AB_distillation criterion_alternative_L2",
        MAPS,
        mean(losses.activation_boundary_loss),
        183.2407746,
        15.63077198,
    ),
    Row(
        "NORM train_distill, co_sponge 3",
        ((3, 4, 4, 6), (3, 4, 4, 2)),
        mean(losses.many_to_one_loss),
        5.851399775,
        0.4937695049,
    ),
    Row(
        "OFAKD ofa_loss",
        LOGITS,
        mean(losses.enhanced_target_loss, LABELS, exponent=1.4, temperature=1.5),
        1.429772565,
        0.1129269591,
        2,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.source for row in ROWS])
def test_values_and_gradients_equal_public_code(row):
    value, gradient = jax.jit(jax.value_and_grad(row.loss))(*draw(*row.inputs, scale=row.scale))
    np.testing.assert_allclose(value, row.value, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(gradient.ravel()), row.gradient, rtol=1e-5)


def test_bank_update_equals_public_code():
    """Compares a weighted sum of the rows of RepDistiller's ContrastMemory, at momentum 0.5."""
    student, teacher, student_rows, teacher_rows, *probes = draw(*BANK, (8, 6), (8, 6))
    bank = losses.update_bank(bank_of(student_rows, teacher_rows), student, teacher, POSITIVES)
    np.testing.assert_allclose(
        (bank.student * probes[0] + bank.teacher * probes[1]).sum(), -4.483094892, rtol=1e-5
    )
