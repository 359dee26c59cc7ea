"""Caching of teachers, and views and augmentation of stages on images."""

import numpy as np
import pytest

from experiments.common import images, plans
from experiments.common.cli import OptionError
from experiments.common.images import Options
from jaxkd import data, models


def test_teachers_can_be_cached_if_all_views_are_known():
    assert Options().can_cache_teachers and Options(augment=True, views=3).can_cache_teachers
    assert not Options(augment=True).can_cache_teachers


def test_stage_has_the_views_of_the_options():
    model = models.from_linen(models.CNN((4,), 4))
    examples = {"inputs": np.zeros((6, 8, 8, 1), np.uint8), "labels": np.arange(6)}
    plain, new_views, fixed_views = (
        images.make_stage("stage", model, examples, plans.supervised_loss, options, steps=1)
        for options in (Options(), Options(augment=True), Options(augment=True, views=3))
    )
    assert (plain.augment, plain.views) == (None, None)
    assert (new_views.augment, new_views.views) == (data.crop_and_flip, None)
    assert (fixed_views.augment, fixed_views.views) == (data.crop_and_flip, 3)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"views": 3}, "--views 3: needs at least 1, together with --augment"),
        ({"augment": True, "views": 0}, "--views 0"),
    ],
)
def test_refuses_invalid_options(options, error):
    with pytest.raises(OptionError, match=error):
        Options(**options).check()
