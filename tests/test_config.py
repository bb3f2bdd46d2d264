"""Claims about ril_jax/config.py: fields that cannot work are refused in one line that names them."""

import pytest

from ril_jax.config import default_config, validate
from ril_jax.errors import InputError

RUNGS = "config.data.vision_rungs"


def config(**data):
    c = default_config()
    c.data.teacher_data = "responses"
    c.reward.judge.kind = "rules"
    for field, value in data.items():
        c.data[field] = value
    return c


@pytest.mark.parametrize("rungs", [(), (13,), ((13,),), ([64, 4, 64],), ((64, 4, 64, 1), (64, 4, 64, 0, 0), 5, [12])])
def test_rungs_of_either_family_are_accepted(rungs):
    validate(config(vision_rungs=rungs))


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        (((64, 4, 64), (12, 4)), rf"{RUNGS}\[1\]=\(12, 4\) must be whole numbers: \(tiles,\) for InternVL, or"),
        ((0,), rf"{RUNGS}\[0\]=0 must be whole"),
        (((64, 0, 64),), "must be whole"),
        (((64, 4, 64, -1),), "must be whole"),
        ((12.0,), "must be whole"),
        ((True,), "must be whole"),
        (("12",), "must be whole"),
        (((),), "must be whole"),
        (((64, 4, 64, 1, 64, 1),), "must be whole"),
        (((66, 4, 64),), r"\[0\]=\(66, 4, 64\): numbers of patches must be multiples of 4"),
        (((64, 4, 62),), "multiples of 4"),
    ],
)
def test_rungs_of_no_family_are_refused_with_their_place(rungs, message):
    with pytest.raises(InputError, match=message) as refusal:
        validate(config(vision_rungs=rungs))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value"), [("max_tiles", -1), ("max_tiles", 1.5), ("max_pixels", 0), ("min_pixels", -784)]
)
def test_limits_of_an_image_must_be_numbers_that_can_be(field, value):
    c = config()
    with c.ignore_type():
        c.data[field] = value
    with pytest.raises(InputError, match=rf"config.data.{field}={value} must be a whole number"):
        validate(c)


@pytest.mark.parametrize("value", [0, 1, 12])
def test_tile_limit_may_be_left_to_the_checkpoint(value):
    validate(config(max_tiles=value))
