"""Which devices train how many students, and when a teacher may answer once."""

import types

import numpy as np
import pytest

from experiments import plans, vision
from experiments.cli import OptionError
from experiments.vision import Options
from jaxkd import data, losses, models, parallel


@pytest.fixture
def tpu(monkeypatch):
    """Eight devices that are no CPU."""
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="tpu")] * 8), size=8)
    monkeypatch.setattr(parallel, "make_mesh", lambda **options: mesh)


def test_a_cpu_trains_one_student_after_another_unless_told():
    assert isinstance(plans.devices(Options(seeds=32)), parallel.Sharded)
    asked = plans.devices(Options(seeds=32, at_once=4))
    assert isinstance(asked, parallel.Population) and asked.size == 4 and asked.mesh.size == 8
    assert plans.devices(Options(at_once=2, parallel="none")).mesh.size == 1


@pytest.mark.parametrize(("seeds", "alike", "size"), [(8, 1, 8), (3, 20, 60), (32, 20, plans.AT_ONCE)])
def test_an_accelerator_trains_all_at_once(tpu, seeds, alike, size):
    devices = plans.devices(Options(seeds=seeds), alike=alike)
    assert isinstance(devices, parallel.Population) and devices.size == size


@pytest.mark.parametrize("options", [{"seeds": 3}, {"seeds": 32, "at_once": 1}, {"seeds": 32, "model_devices": 2}])
def test_an_accelerator_divides_the_batch_where_devices_would_idle(tpu, options):
    assert isinstance(plans.devices(Options(**options)), parallel.Sharded)


def test_teachers_answer_once_where_all_pictures_are_known():
    assert Options().caches_teachers and Options(augment=True, views=3).caches_teachers
    assert not Options(augment=True).caches_teachers


def test_a_stage_shows_the_views_that_the_options_ask_for():
    model, images = models.from_linen(models.CNN((4,), 4)), np.zeros((6, 8, 8, 1), np.uint8)

    def loss(student, teachers, batch):
        return losses.hard_cross_entropy(student.logits, batch["labels"])

    given = {"inputs": images, "labels": np.arange(6)}
    plain, drawn, shown = (
        vision.stage("one", model, given, loss, options, steps=1)
        for options in (Options(), Options(augment=True), Options(augment=True, views=3))
    )
    assert (plain.augment, plain.views) == (None, None)
    assert (drawn.augment, drawn.views) == (data.crop_and_flip, None)
    assert (shown.augment, shown.views) == (data.crop_and_flip, 3)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"views": 3}, "--views 3: at least one, and of images that --augment"),
        ({"augment": True, "views": 0}, "--views 0"),
        ({"at_once": 2, "model_devices": 2}, "--at-once 2"),
        ({"at_once": 2, "coordinator": "auto"}, "--at-once 2"),
    ],
)
def test_refuses_what_makes_no_sense(options, error):
    with pytest.raises(OptionError, match=error):
        Options(**options).check()
