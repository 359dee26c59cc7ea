"""Tests of stages whose augmentation mixes examples: what the loss gets, one and eight devices."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import data, distill, losses, models, runs
from jaxkd.distill import _lowering, methods

IMAGES = np.random.default_rng(0).random((16, 6, 6, 1), np.float32)
LABELS = (np.arange(16) % 3).astype(np.int32)
BATCH = {"inputs": IMAGES, "labels": LABELS}


def make_model():
    return models.from_linen(models.CNN((4,), 8, num_classes=3))


def test_loss_gets_the_mixture_of_its_inputs():
    seen = {}

    def apply(variables, inputs, *, train, key=None):
        seen["inputs"] = inputs
        return models.Outputs(inputs.mean((1, 2)) * variables["params"]["w"], {}), {}

    def loss(student, teachers, batch, context):
        seen["mix"], seen["batch"] = context.mix, batch
        return student.logits[:, 0]

    model = models.Model(lambda key, inputs: {"params": {"w": jnp.ones((1, 3))}}, apply)
    tx = optax.sgd(0.1)
    with jax.disable_jit():
        step = distill.make_train_step(model, tx, loss, augment=data.mixup)
        step(distill.init_train_state(model.init(None, None), tx), BATCH, (), jax.random.key(3))
    partner, weight = seen["mix"]
    share = np.asarray(weight)[:, None, None, None]
    expected = share * IMAGES + (1 - share) * IMAGES[np.asarray(partner)]
    np.testing.assert_allclose(seen["inputs"], expected, atol=1e-6)
    # The user's arrays stay as they are.
    np.testing.assert_array_equal(seen["batch"]["inputs"], IMAGES)


def test_context_has_no_mixture_without_one():
    def loss(student, teachers, batch, context):
        assert context.mix is None
        return losses.hard_cross_entropy(student.logits, batch["labels"])

    model, tx = make_model(), optax.sgd(0.1)
    step = distill.make_train_step(model, tx, loss)
    state = distill.init_train_state(model.init(jax.random.key(0), IMAGES), tx)
    step(state, BATCH, (), jax.random.key(1))


@pytest.mark.parametrize("name", ["supervised", "kd", "jsd"])
def test_losses_by_name_mix_the_labels(name):
    model = make_model()
    outputs = model.apply(model.init(jax.random.key(0), IMAGES), IMAGES, train=False)[0]
    teacher = outputs._replace(logits=outputs.logits[:, ::-1] * 2)
    mix = data.mixup(jax.random.key(1), jnp.asarray(IMAGES)).mix
    loss = {
        "supervised": methods.supervised_loss,
        "kd": methods.make_soft_target_loss(temperature=2.0, alpha=0.25),
        "jsd": methods.make_loss(methods.make_method("jsd", outputs, teacher, temperature=2.0)),
    }[name]
    context = distill.LossContext(jnp.int32(0), None, jax.random.key(0), None, None, mix)
    values = loss(outputs, (teacher,), {"labels": jnp.asarray(LABELS)}, context)
    plain = loss(outputs, (teacher,), {"labels": jnp.asarray(LABELS)}, context._replace(mix=None))
    hard = losses.hard_cross_entropy(outputs.logits, jnp.asarray(LABELS))
    mixed = optax.softmax_cross_entropy(
        outputs.logits, data.mix_labels(jnp.asarray(LABELS), mix, 3)
    )
    share = 0.75 if name == "kd" else 1.0
    np.testing.assert_allclose(values - plain, share * (mixed - hard), atol=1e-5)


def test_eight_devices_mix_as_one():
    model, tx = make_model(), optax.sgd(0.5)
    stage = distill.Stage(
        "student",
        model,
        BATCH,
        methods.supervised_loss,
        tx,
        steps=3,
        batch_size=8,
        augment=data.cutmix,
    )
    results = []
    for placement in (None, distill.MeshPlacement(distill.make_mesh()), distill.PmapPlacement()):
        trained = train_once(stage, placement)
        results.append(jax.tree.leaves(trained.variables["params"]))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            np.testing.assert_allclose(first, second, atol=1e-5)


def train_once(stage, placement):
    with tempfile.TemporaryDirectory() as folder:
        run = runs.open_run(folder, {})
        options = {} if placement is None else {"placement": placement}
        (trained,) = distill.run_plan([stage], [0], run, validation=BATCH, **options)["student"]
    return trained


def mixing_loss(student, teachers, batch, context):
    targets = data.mix_labels(batch["labels"], context.mix, 3)
    return optax.softmax_cross_entropy(student.logits, targets)


def hard_loss(student, teachers, batch, context):
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def soft_loss(student, teachers, batch, context):
    return losses.kl_divergence(student.logits, teachers[0].logits, temperature=2.0)


@pytest.mark.parametrize(
    ("loss", "augment", "expected"),
    [
        (hard_loss, data.mixup, ["labels"]),
        (hard_loss, data.random_flip, []),
        (mixing_loss, data.mixup, []),
        (soft_loss, data.cutmix, []),
        (lambda *arguments: hard_loss(*arguments) + soft_loss(*arguments), data.cutmix, ["labels"]),
    ],
    ids=["labels", "no mixture", "mixed labels", "teacher", "both"],
)
def test_labels_that_are_not_mixed_are_found(loss, augment, expected):
    model, examples = make_model(), BATCH | {"temperature": 4.0}
    pretrained = distill.Pretrained("teacher", model, model.init(jax.random.key(0), IMAGES))
    stage = distill.Stage(
        "student",
        model,
        examples,
        loss,
        optax.sgd(0.1),
        steps=2,
        batch_size=8,
        augment=augment,
        teachers=("teacher",),
    )
    entries = {"teacher": pretrained, "student": stage}
    assert _lowering.find_unmixed(stage, entries, 0) == expected


def test_a_loss_that_ignores_the_mixture_is_named(tmp_path):
    stage = distill.Stage(
        "plain",
        make_model(),
        BATCH,
        hard_loss,
        optax.sgd(0.1),
        steps=2,
        batch_size=8,
        augment=data.mixup,
    )
    run = runs.open_run(tmp_path, {})
    with pytest.warns(UserWarning, match="the loss of stage 'plain' reads labels as if its aug"):
        distill.run_plan([stage], [0], run, validation=BATCH)
