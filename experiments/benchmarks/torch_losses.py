"""The losses of `jaxkd.losses` in plain PyTorch, as PyTorch's users write them.

`experiments.benchmarks.losses` times them. Each takes the arrays of the loss of the same name in
`jaxkd.losses` and returns the mean over the examples. Images are B H W C, which in memory is
PyTorch's format `channels_last`. Masks, classes at −inf and zero vectors are not supported.
"""

import importlib
import math
from typing import Any

# Imported by name, so that the type checker runs where PyTorch is not installed.
torch: Any = importlib.import_module("torch")
functional: Any = importlib.import_module("torch.nn.functional")

Tensor = Any


def soft_cross_entropy(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Computes the cross-entropy with the teacher's softened probabilities as targets."""
    # PyTorch's cross_entropy takes probabilities as well as labels.
    targets = torch.softmax(teacher / temperature, -1)
    return temperature**2 * functional.cross_entropy(student / temperature, targets)


def kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Computes KL(teacher ‖ student) of the softened probabilities."""
    return temperature**2 * _kl(
        _log_probabilities(student, temperature), _log_probabilities(teacher, temperature)
    )


def reverse_kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Computes KL(student ‖ teacher) of the softened probabilities."""
    return kl_divergence(teacher, student, temperature=temperature)


def jensen_shannon_divergence(
    student: Tensor, teacher: Tensor, *, temperature: float, beta: float
) -> Tensor:
    """Computes the generalised Jensen–Shannon divergence; β weighs the teacher in the mixture."""
    student = _log_probabilities(student, temperature)
    teacher = _log_probabilities(teacher, temperature)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return temperature**2 * (beta * _kl(mixture, teacher) + (1 - beta) * _kl(mixture, student))


def logit_mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the mean squared difference of logits."""
    return functional.mse_loss(student, teacher)


def standardized_kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Computes the KL divergence of logits scaled to mean 0 and standard deviation 1."""
    return kl_divergence(_standardize(student), _standardize(teacher), temperature=temperature)


def label_smoothing_loss(logits: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    """Computes the cross-entropy with smoothed labels."""
    return functional.cross_entropy(logits, labels, label_smoothing=smoothing)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
) -> Tensor:
    """Computes the weighted sum of the softened term and the cross-entropy with the labels."""
    soft = soft_cross_entropy(student, teacher, temperature=temperature)
    return alpha * soft + (1 - alpha) * functional.cross_entropy(student, labels)


def decoupled_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    non_target_weight: float,
) -> Tensor:
    """Computes DKD: the label against all other classes, and the other classes among themselves."""
    target = functional.one_hot(labels, student.shape[-1]).bool()
    student = student / temperature
    teacher = teacher / temperature
    binary = [_binary(logits, labels, target) for logits in (student, teacher)]
    # A logit of −inf removes the label from the softmax over the other classes.
    student_others, teacher_others = (
        torch.log_softmax(logits.masked_fill(target, -math.inf), -1)
        for logits in (student, teacher)
    )
    # The label's own term is −inf minus −inf.
    gap = (teacher_others - student_others).masked_fill(target, 0)
    terms = teacher_others.exp() * gap
    return temperature**2 * (_kl(*binary) + non_target_weight * terms.sum(-1).mean())


def normalized_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    gamma: float = 1.5,
) -> Tensor:
    """Computes NKD: the label weighted by the teacher's trust, and the other classes normalised."""
    target = functional.one_hot(labels, student.shape[-1]).bool()
    trust = torch.softmax(teacher, -1).gather(1, labels[:, None])
    label_term = (trust * torch.log_softmax(student, -1).gather(1, labels[:, None])).mean()
    student, teacher = (
        logits.masked_fill(target, -math.inf) / temperature for logits in (student, teacher)
    )
    terms = torch.softmax(teacher, -1) * torch.log_softmax(student, -1).masked_fill(target, 0)
    return -label_term - gamma * temperature**2 * terms.sum(-1).mean()


def enhanced_target_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, exponent: float
) -> Tensor:
    """Computes the loss of OFA-KD: the label is moved by 1 before and after the power."""
    target = functional.one_hot(labels, student.shape[-1]).to(student.dtype)
    weights = (torch.softmax(teacher / temperature, -1) + target) ** exponent - target
    return -(weights * _log_probabilities(student, temperature)).sum(-1).mean()


def ensemble_kl_divergence(student: Tensor, teachers: Tensor, *, temperature: float) -> Tensor:
    """Computes the KL divergence from the average of the teachers' softened probabilities."""
    targets = torch.softmax(teachers / temperature, -1).mean(0)
    return temperature**2 * functional.kl_div(
        _log_probabilities(student, temperature), targets, reduction="batchmean"
    )


def dist_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Computes DIST: one minus the correlation over classes, and one minus that over examples."""
    student, teacher = (torch.softmax(logits / temperature, -1) for logits in (student, teacher))
    inter, intra = (_correlation(student, teacher, dim).mean() for dim in (-1, 0))
    return temperature**2 * (2 - inter - intra)


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the mean squared difference of feature maps."""
    return functional.mse_loss(student, teacher)


def attention_transfer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the distance of the normalised activation maps."""
    return (_activation_map(student) - _activation_map(teacher)).norm(dim=-1).mean()


def attention_transfer_mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the mean squared difference of the normalised activation maps."""
    return functional.mse_loss(_activation_map(student), _activation_map(teacher))


def neuron_selectivity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes NST with the polynomial kernel."""
    student, teacher = (
        functional.normalize(features.flatten(1, 2), dim=1) for features in (student, teacher)
    )

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        return torch.bmm(first.mT, second).square().mean()

    return kernel(teacher, teacher) + kernel(student, student) - 2 * kernel(student, teacher)


def flow_of_solution_procedure_loss(
    student_first: Tensor, student_second: Tensor, teacher_first: Tensor, teacher_second: Tensor
) -> Tensor:
    """Computes the squared distance of the FSP matrices."""
    gap = _flow_matrix(student_first, student_second) - _flow_matrix(teacher_first, teacher_second)
    return gap.square().sum((1, 2)).mean()


def variational_information_loss(
    kernel: Tensor, bias: Tensor, raw_variance: Tensor, student: Tensor, teacher: Tensor
) -> Tensor:
    """Computes VID with a 1×1 convolution for the mean."""
    variance = functional.softplus(raw_variance) + 1e-5
    mean = functional.linear(student, kernel.mT, bias)
    return ((teacher - mean).square() / variance + variance.log()).mean() / 2


def channel_wise_divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Computes CWD: the KL divergence of each channel's softmax over positions."""
    # Positions last, and one row per example and channel.
    student, teacher = (maps.flatten(1, 2).mT.flatten(0, 1) for maps in (student, teacher))
    return kl_divergence(student, teacher, temperature=temperature)


def class_attention_loss(student: Tensor, teacher: Tensor, *, size: int) -> Tensor:
    """Computes CAT-KD of class activation maps."""
    student, teacher = (
        functional.normalize(_pool(maps, size).flatten(2), dim=-1) for maps in (student, teacher)
    )
    return functional.mse_loss(student, teacher)


def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes HCL of maps larger than 4 × 4."""
    total = functional.mse_loss(student, teacher)
    for weight, size in ((1 / 2, 4), (1 / 4, 2), (1 / 8, 1)):
        gap = functional.mse_loss(_pool(student, size), _pool(teacher, size))
        total = total + weight * gap
    return total / (1 + 1 / 2 + 1 / 4 + 1 / 8)


def activation_boundary_loss(student: Tensor, teacher: Tensor, *, margin: float) -> Tensor:
    """Computes AB: a squared hinge loss on the signs of the teacher's units."""
    towards_teacher = torch.where(teacher > 0, student, -student)
    return functional.relu(margin - towards_teacher).square().sum() / len(student)


def many_to_one_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes NORM: the student's segments against copies of the teacher."""
    segments = student.shape[-1] // teacher.shape[-1]
    return segments * functional.mse_loss(student, teacher.repeat(1, 1, 1, segments))


def factor_transfer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes FT of factors."""
    student, teacher = (
        functional.normalize(maps.flatten(1), dim=-1) for maps in (student, teacher)
    )
    return functional.l1_loss(student, teacher)


def orthogonal_projection_loss(raw_kernel: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Computes VkD with the QR decomposition of the kernel's transpose."""
    orthonormal, triangular = torch.linalg.qr(raw_kernel.mT)
    orthonormal = orthonormal * triangular.diagonal().sign()
    return functional.smooth_l1_loss(student @ orthonormal.mT, _standardize(teacher))


def contrastive_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Computes CRD with the other examples of the batch as negatives."""
    student = functional.normalize(student, dim=-1)
    teacher = functional.normalize(teacher, dim=-1)
    batch = len(student)
    log_odds = student @ teacher.mT / temperature - math.log((batch - 1) / batch)
    return functional.softplus(log_odds).sum(1).mean() - log_odds.diagonal().mean()


def similarity_preserving_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes SP: the mean squared difference of the normalised Gram matrices."""
    student = functional.normalize(_gram(student), dim=-1)
    teacher = functional.normalize(_gram(teacher), dim=-1)
    return (student - teacher).square().mean()


def relational_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes RKD on distances."""
    return functional.huber_loss(_relative_distances(student), _relative_distances(teacher))


def relational_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes RKD on angles."""
    return functional.huber_loss(_angles(student), _angles(teacher))


def probabilistic_transfer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes PKT without the pairs of an example with itself."""
    student = _neighbour_probabilities(student)
    teacher = _neighbour_probabilities(teacher)
    # The clamp keeps the pairs of an example with itself, whose probability is 0, out of log(0).
    return (teacher * (teacher.clamp(min=1e-30) / student.clamp(min=1e-30)).log()).sum(-1).mean()


def correlation_congruence_loss(student: Tensor, teacher: Tensor, *, gamma: float = 0.4) -> Tensor:
    """Computes CC with a Gaussian kernel expanded to the second order."""
    student, teacher = (
        _gram(functional.normalize(features, dim=-1)) for features in (student, teacher)
    )
    rate = 2 * gamma
    gap = rate * (student - teacher) + rate**2 / 2 * (student.square() - teacher.square())
    return math.exp(-2 * rate) * gap.square().mean()


def linear_cka_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes one minus the linear centred kernel alignment, from the Gram matrices."""
    student = _gram(student - student.mean(0))
    teacher = _gram(teacher - teacher.mean(0))
    return 1 - (student * teacher).sum() / (student.norm() * teacher.norm())


def margin_mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the mean squared difference of the margins of the first document."""
    student, teacher = (scores[:, :1] - scores[:, 1:] for scores in (student, teacher))
    return functional.mse_loss(student, teacher)


def score_divergence_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Computes the KL divergence over the documents of a query."""
    return kl_divergence(student, teacher, temperature=temperature)


def skewed_kl_divergence(
    student: Tensor, teacher: Tensor, *, temperature: float, skew: float
) -> Tensor:
    """Computes KL(teacher ‖ mixture), of which the teacher has a small share."""
    student = _log_probabilities(student, temperature)
    teacher = _log_probabilities(teacher, temperature)
    mixture = torch.logaddexp(teacher + math.log(skew), student + math.log1p(-skew))
    return temperature**2 * _kl(mixture, teacher)


def skewed_reverse_kl_divergence(
    student: Tensor, teacher: Tensor, *, temperature: float, skew: float
) -> Tensor:
    """Computes KL(student ‖ mixture), of which the student has a small share."""
    return skewed_kl_divergence(teacher, student, temperature=temperature, skew=skew)


def adaptive_kl_divergence(
    student: Tensor, teacher: Tensor, *, temperature: float, head: float
) -> Tensor:
    """Computes forward and reverse KL, weighted by their gaps in the teacher's head and tail."""
    student = _log_probabilities(student, temperature)
    teacher = _log_probabilities(teacher, temperature)
    with torch.no_grad():
        likely, order = teacher.exp().sort(-1, descending=True)
        gaps = (likely - student.exp().gather(-1, order)).abs()
        in_head = likely.cumsum(-1) <= head
        in_head[..., 0] = True
        share = (gaps * in_head).sum(-1) / gaps.sum(-1)
    forward = (teacher.exp() * (teacher - student)).sum(-1)
    reverse = (student.exp() * (student - teacher)).sum(-1)
    return temperature**2 * (share * forward + (1 - share) * reverse).mean()


def alpha_beta_divergence(
    student: Tensor, teacher: Tensor, *, temperature: float, alpha: float, beta: float
) -> Tensor:
    """Computes the α-β divergence of the softened probabilities."""
    student = torch.softmax(student / temperature, -1)
    teacher = torch.softmax(teacher / temperature, -1)
    total = alpha + beta
    terms = (
        teacher**alpha * student**beta
        - alpha / total * teacher**total
        - beta / total * student**total
    )
    return -(temperature**2) / (alpha * beta) * terms.sum(-1).mean()


def renyi_divergence(
    student: Tensor, teacher: Tensor, *, temperature: float, order: float
) -> Tensor:
    """Computes the Rényi divergence of the teacher from the student."""
    student = _log_probabilities(student, temperature)
    teacher = _log_probabilities(teacher, temperature)
    values = torch.logsumexp(order * teacher + (1 - order) * student, -1) / (order - 1)
    return temperature**2 * values.mean()


def total_variation_distance(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Computes half the L1 distance of the softened probabilities, times T."""
    student = torch.softmax(student / temperature, -1)
    teacher = torch.softmax(teacher / temperature, -1)
    return temperature / 2 * (teacher - student).abs().sum(-1).mean()


def transformed_teacher_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, weighted: bool
) -> Tensor:
    """Computes KL(softened teacher ‖ student at T = 1), weighted by the teacher's smoothness."""
    softened = _log_probabilities(teacher, temperature)
    values = (softened.exp() * (softened - torch.log_softmax(student, -1))).sum(-1)
    if weighted:
        values = (torch.softmax(teacher, -1) ** (1 / temperature)).sum(-1) * values
    return values.mean()


def refined_logits_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    correlation_weight: float,
) -> Tensor:
    """Computes RLD: the teacher's confidence, and the classes that it ranks below the label."""
    below = teacher < teacher.gather(1, labels[:, None])
    student = student / temperature
    teacher = teacher / temperature
    top = teacher.argmax(-1)
    one_hot = functional.one_hot
    count = student.shape[-1]
    teacher_binary = _binary(teacher, top, one_hot(top, count).bool())
    student_binary = _binary(student, labels, one_hot(labels, count).bool())
    student_below, teacher_below = (
        torch.log_softmax(logits.masked_fill(~below, -math.inf), -1)
        for logits in (student, teacher)
    )
    terms = (teacher_below.exp() * (teacher_below - student_below)).masked_fill(~below, 0)
    correlation = terms.sum(-1).mean()
    return temperature**2 * (_kl(student_binary, teacher_binary) + correlation_weight * correlation)


def multi_level_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes MLKD: divergences of examples, pairs of examples and pairs of classes."""
    total = 0.0
    for temperature in (2.0, 3.0, 4.0, 5.0, 6.0):
        p, q = (torch.softmax(logits / temperature, -1) for logits in (teacher, student))
        pairs = ((p @ p.mT - q @ q.mT) ** 2).sum(-1).mean()
        classes = ((p.mT @ p - q.mT @ q) ** 2).sum() / p.shape[-1]
        total = total + kl_divergence(student, teacher, temperature=temperature) + pairs + classes
    return total


def simple_recipe_loss(kernel: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Computes SRD: the logarithm of the fourth powers of differences of normalised features."""
    student, teacher = (
        functional.batch_norm(features, None, None, training=True, eps=1e-4)
        for features in (student @ kernel, teacher)
    )
    return torch.log((student - teacher).abs().pow(4).sum() + 1e-5)


def universal_logit_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the L1 distance of sorted probabilities; the student's vocabulary is smaller."""
    student, teacher = (
        torch.softmax(logits, -1).sort(-1, descending=True).values for logits in (student, teacher)
    )
    student = functional.pad(student, (0, teacher.shape[-1] - student.shape[-1]))
    return (student - teacher).abs().sum(-1).mean()


def hidden_cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes one minus the cosine of hidden states."""
    return 1 - functional.cosine_similarity(student, teacher, -1).mean()


def hidden_mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the mean squared difference of hidden states."""
    return functional.mse_loss(student, teacher)


def attention_map_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the mean squared difference of attention weights."""
    return functional.mse_loss(student, teacher)


def attention_divergence_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the KL divergence of attention weights."""
    return functional.kl_div(student.log(), teacher, reduction="none").sum(-1).mean()


def value_relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the KL divergence of the relations between values."""
    student = _log_relations(student)
    teacher = _log_relations(teacher)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()


def linear_kl_divergence(
    states: Tensor, kernel: Tensor, teacher_states: Tensor, teacher_kernel: Tensor
) -> Tensor:
    """Computes the KL divergence of the logits of a last layer, at T = 1."""
    return kl_divergence(
        *_last_layer_logits(states, kernel, teacher_states, teacher_kernel), temperature=1.0
    )


def linear_reverse_kl_divergence(
    states: Tensor, kernel: Tensor, teacher_states: Tensor, teacher_kernel: Tensor
) -> Tensor:
    """Computes the reverse KL divergence of the logits of a last layer, at T = 1."""
    return reverse_kl_divergence(
        *_last_layer_logits(states, kernel, teacher_states, teacher_kernel), temperature=1.0
    )


def linear_jensen_shannon_divergence(
    states: Tensor, kernel: Tensor, teacher_states: Tensor, teacher_kernel: Tensor
) -> Tensor:
    """Computes the Jensen–Shannon divergence of the logits of a last layer, at T = 1."""
    logits = _last_layer_logits(states, kernel, teacher_states, teacher_kernel)
    return jensen_shannon_divergence(*logits, temperature=1.0, beta=0.5)


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits / temperature, -1)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    # The default reduction would also divide by the number of classes.
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _standardize(logits: Tensor) -> Tensor:
    return (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, correction=0, keepdim=True)


def _binary(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Returns the log-probabilities of the label and of all other classes together."""
    label = torch.log_softmax(logits, -1).gather(1, labels[:, None])
    other_classes = logits.masked_fill(target, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([label, other_classes - logits.logsumexp(-1, keepdim=True)], -1)


def _correlation(first: Tensor, second: Tensor, dim: int) -> Tensor:
    first, second = (x - x.mean(dim, keepdim=True) for x in (first, second))
    # PyTorch's default eps of 1e-8 would bias the correlation of nearly constant probabilities.
    return functional.cosine_similarity(first, second, dim, eps=1e-30)


def _activation_map(features: Tensor) -> Tensor:
    return functional.normalize(features.square().sum(-1).flatten(1), dim=-1)


def _pool(maps: Tensor, size: int) -> Tensor:
    """Averages maps B H W C to `[B, C, size, size]`."""
    return functional.adaptive_avg_pool2d(maps.movedim(-1, 1), size)


def _flow_matrix(first: Tensor, second: Tensor) -> Tensor:
    first = first.flatten(1, 2)
    second = second.flatten(1, 2)
    return torch.bmm(first.mT, second) / first.shape[1]


def _gram(features: Tensor) -> Tensor:
    features = features.flatten(1)
    return features @ features.mT


def _relative_distances(features: Tensor) -> Tensor:
    # The expansion by a matrix product loses the digits of small distances.
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    batch = len(features)
    return distances * (batch * (batch - 1)) / distances.sum()


def _angles(features: Tensor) -> Tensor:
    directions = functional.normalize(features[None] - features[:, None], dim=-1)
    return torch.bmm(directions, directions.mT)


def _neighbour_probabilities(features: Tensor) -> Tensor:
    similarities = (1 + _gram(functional.normalize(features, dim=-1))) / 2
    similarities = similarities * (1 - torch.eye(len(similarities), device=similarities.device))
    return similarities / similarities.sum(-1, keepdim=True)


def _log_relations(values: Tensor) -> Tensor:
    values = values.transpose(-3, -2)
    return torch.log_softmax(values @ values.mT / math.sqrt(values.shape[-1]), -1)


def _last_layer_logits(
    states: Tensor, kernel: Tensor, teacher_states: Tensor, teacher_kernel: Tensor
) -> tuple[Tensor, Tensor]:
    # Softmax and divergences need float32, whatever the dtype of the matrix products.
    return (states @ kernel).float(), (teacher_states @ teacher_kernel).float()
