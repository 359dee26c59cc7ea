"""The losses of `jaxkd.losses` in plain PyTorch, as its users write them, for `experiments.loss_benchmark` to time.

Each takes the same arrays as its namesake and returns the mean over the examples. Images are B H W C here too, which is
PyTorch's memory format `channels_last`. Unlike their namesakes they take no masks, no classes at −inf, no zero vectors.
"""

import importlib
import math
from typing import Any

# By name, so that types can be checked where PyTorch is not installed.
torch: Any = importlib.import_module("torch")
functional: Any = importlib.import_module("torch.nn.functional")

Tensor = Any


def soft_cross_entropy(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy under the teacher's softened probabilities, which PyTorch's own takes as targets."""
    targets = torch.softmax(teacher / temperature, -1)
    return temperature**2 * functional.cross_entropy(student / temperature, targets)


def kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """KL of the student from the teacher."""
    return temperature**2 * _kl(_log(student, temperature), _log(teacher, temperature))


def reverse_kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """KL of the teacher from the student."""
    return kl_divergence(teacher, student, temperature=temperature)


def jensen_shannon_divergence(student: Tensor, teacher: Tensor, *, temperature: float, beta: float) -> Tensor:
    """Generalised Jensen–Shannon divergence; β is the teacher's share of the mixture."""
    student, teacher = _log(student, temperature), _log(teacher, temperature)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return temperature**2 * (beta * _kl(mixture, teacher) + (1 - beta) * _kl(mixture, student))


def logit_mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference."""
    return functional.mse_loss(student, teacher)


def standardized_kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """KL of logits of mean 0 and deviation 1."""
    return kl_divergence(_standardized(student), _standardized(teacher), temperature=temperature)


def label_smoothing_loss(logits: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    """Cross-entropy with classes of which a share is spread over all."""
    return functional.cross_entropy(logits, labels, label_smoothing=smoothing)


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 2.0, alpha: float = 0.5
) -> Tensor:
    """Softened targets and labels, mixed."""
    soft = soft_cross_entropy(student, teacher, temperature=temperature)
    return alpha * soft + (1 - alpha) * functional.cross_entropy(student, labels)


def decoupled_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, non_target_weight: float
) -> Tensor:
    """DKD: the label against the rest, and the rest among themselves, where the label's logit is −inf."""
    target = functional.one_hot(labels, student.shape[-1]).bool()
    student, teacher = student / temperature, teacher / temperature
    binary = [_binary(logits, labels, target) for logits in (student, teacher)]
    others = [torch.log_softmax(logits.masked_fill(target, -math.inf), -1) for logits in (student, teacher)]
    terms = others[1].exp() * (others[1] - others[0]).masked_fill(target, 0)
    return temperature**2 * (_kl(*binary) + non_target_weight * terms.sum(-1).mean())


def normalized_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 1.0, gamma: float = 1.5
) -> Tensor:
    """NKD: the teacher's trust in the label, and the other classes normalised."""
    target = functional.one_hot(labels, student.shape[-1]).bool()
    trust = torch.softmax(teacher, -1).gather(1, labels[:, None])
    own = (trust * torch.log_softmax(student, -1).gather(1, labels[:, None])).mean()
    student, teacher = (logits.masked_fill(target, -math.inf) / temperature for logits in (student, teacher))
    terms = torch.softmax(teacher, -1) * torch.log_softmax(student, -1).masked_fill(target, 0)
    return -own - gamma * temperature**2 * terms.sum(-1).mean()


def ensemble_kl_divergence(student: Tensor, teachers: Tensor, *, temperature: float) -> Tensor:
    """KL from the average of several teachers' softened probabilities."""
    targets = torch.softmax(teachers / temperature, -1).mean(0)
    return temperature**2 * functional.kl_div(_log(student, temperature), targets, reduction="batchmean")


def dist_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """DIST: both correlations."""
    student, teacher = (torch.softmax(logits / temperature, -1) for logits in (student, teacher))
    inter, intra = (_correlation(student, teacher, dim).mean() for dim in (-1, 0))
    return temperature**2 * (2 - inter - intra)


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference."""
    return functional.mse_loss(student, teacher)


def attention_transfer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance of the maps of activity."""
    return (_activity(student) - _activity(teacher)).norm(dim=-1).mean()


def attention_transfer_mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the maps of activity."""
    return functional.mse_loss(_activity(student), _activity(teacher))


def neuron_selectivity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """NST with the polynomial kernel."""
    student, teacher = (functional.normalize(features.flatten(1, 2), dim=1) for features in (student, teacher))

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        return torch.bmm(first.mT, second).square().mean()

    return kernel(teacher, teacher) + kernel(student, student) - 2 * kernel(student, teacher)


def flow_of_solution_procedure_loss(
    student_first: Tensor, student_second: Tensor, teacher_first: Tensor, teacher_second: Tensor
) -> Tensor:
    """FSP."""
    gap = _flow(student_first, student_second) - _flow(teacher_first, teacher_second)
    return gap.square().sum((1, 2)).mean()


def variational_information_loss(
    kernel: Tensor, bias: Tensor, raw_variance: Tensor, student: Tensor, teacher: Tensor
) -> Tensor:
    """VID with a 1×1 convolution for the mean."""
    variance = functional.softplus(raw_variance) + 1e-5
    mean = functional.linear(student, kernel.mT, bias)
    return ((teacher - mean).square() / variance + variance.log()).mean() / 2


def contrastive_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """CRD with the batch's other examples as negatives."""
    student, teacher = functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1)
    batch = len(student)
    log_odds = student @ teacher.mT / temperature - math.log((batch - 1) / batch)
    return functional.softplus(log_odds).sum(1).mean() - log_odds.diagonal().mean()


def similarity_preserving_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """SP."""
    gap = functional.normalize(_gram(student), dim=-1) - functional.normalize(_gram(teacher), dim=-1)
    return gap.square().mean()


def relational_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD on distances."""
    return functional.huber_loss(_relative_distances(student), _relative_distances(teacher))


def relational_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD on angles."""
    return functional.huber_loss(_angles(student), _angles(teacher))


def probabilistic_transfer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """PKT without the pairs of an example with itself."""
    student, teacher = _neighbours(student), _neighbours(teacher)
    return (teacher * (teacher.clamp(min=1e-30) / student.clamp(min=1e-30)).log()).sum(-1).mean()


def correlation_congruence_loss(student: Tensor, teacher: Tensor, *, gamma: float = 0.4) -> Tensor:
    """CC with a Gaussian kernel expanded to the second order."""
    student, teacher = (_gram(functional.normalize(features, dim=-1)) for features in (student, teacher))
    rate = 2 * gamma
    gap = rate * (student - teacher) + rate**2 / 2 * (student.square() - teacher.square())
    return math.exp(-2 * rate) * gap.square().mean()


def linear_cka_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the linear centred kernel alignment, by the Gram matrices of the examples."""
    student, teacher = _gram(student - student.mean(0)), _gram(teacher - teacher.mean(0))
    return 1 - (student * teacher).sum() / (student.norm() * teacher.norm())


def hidden_cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine."""
    return 1 - functional.cosine_similarity(student, teacher, -1).mean()


def hidden_mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference."""
    return functional.mse_loss(student, teacher)


def attention_map_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference."""
    return functional.mse_loss(student, teacher)


def attention_divergence_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of attention weights."""
    return functional.kl_div(student.log(), teacher, reduction="none").sum(-1).mean()


def value_relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the relations between values."""
    student, teacher = _relations(student), _relations(teacher)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()


def linear_kl_divergence(states: Tensor, kernel: Tensor, teacher_states: Tensor, teacher_kernel: Tensor) -> Tensor:
    """KL of the logits that a last layer makes of hidden states, at T = 1."""
    return kl_divergence(*_logits(states, kernel, teacher_states, teacher_kernel), temperature=1.0)


def linear_reverse_kl_divergence(
    states: Tensor, kernel: Tensor, teacher_states: Tensor, teacher_kernel: Tensor
) -> Tensor:
    """Reverse KL of such logits."""
    return reverse_kl_divergence(*_logits(states, kernel, teacher_states, teacher_kernel), temperature=1.0)


def linear_jensen_shannon_divergence(
    states: Tensor, kernel: Tensor, teacher_states: Tensor, teacher_kernel: Tensor
) -> Tensor:
    """Jensen–Shannon divergence of such logits."""
    logits = _logits(states, kernel, teacher_states, teacher_kernel)
    return jensen_shannon_divergence(*logits, temperature=1.0, beta=0.5)


def _log(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits / temperature, -1)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _standardized(logits: Tensor) -> Tensor:
    return (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, correction=0, keepdim=True)


def _binary(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities of the label and of all other classes together."""
    own = torch.log_softmax(logits, -1).gather(1, labels[:, None])
    rest = logits.masked_fill(target, -math.inf).logsumexp(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)
    return torch.cat([own, rest], -1)


def _correlation(first: Tensor, second: Tensor, dim: int) -> Tensor:
    first, second = (x - x.mean(dim, keepdim=True) for x in (first, second))
    return functional.cosine_similarity(first, second, dim, eps=1e-30)


def _activity(features: Tensor) -> Tensor:
    return functional.normalize(features.square().sum(-1).flatten(1), dim=-1)


def _flow(first: Tensor, second: Tensor) -> Tensor:
    first, second = first.flatten(1, 2), second.flatten(1, 2)
    return torch.bmm(first.mT, second) / first.shape[1]


def _gram(features: Tensor) -> Tensor:
    features = features.flatten(1)
    return features @ features.mT


def _relative_distances(features: Tensor) -> Tensor:
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    batch = len(features)
    return distances * (batch * (batch - 1)) / distances.sum()


def _angles(features: Tensor) -> Tensor:
    directions = functional.normalize(features[None] - features[:, None], dim=-1)
    return torch.bmm(directions, directions.mT)


def _neighbours(features: Tensor) -> Tensor:
    similarities = (1 + _gram(functional.normalize(features, dim=-1))) / 2
    similarities = similarities * (1 - torch.eye(len(similarities), device=similarities.device))
    return similarities / similarities.sum(-1, keepdim=True)


def _relations(values: Tensor) -> Tensor:
    values = values.transpose(-3, -2)
    return torch.log_softmax(values @ values.mT / math.sqrt(values.shape[-1]), -1)


def _logits(states: Tensor, kernel: Tensor, teacher_states: Tensor, teacher_kernel: Tensor) -> tuple[Tensor, Tensor]:
    return (states @ kernel).float(), (teacher_states @ teacher_kernel).float()
