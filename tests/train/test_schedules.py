"""Learning-rate schedules against the reference's values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.train import schedules
from tests.golden_io import golden, tolerance


@pytest.mark.parametrize(
    "key,schedule",
    [
        ("cosine_w5_t20", schedules.reference_stage1_schedule(1e-5, 5, 20)),
        ("cosine_w0_t20", schedules.reference_stage1_schedule(1e-5, 0, 20)),
        ("hf_constant_with_warmup_steps50", schedules.constant_schedule(1e-6)),
        ("hf_cosine_4e-5_warm3_100", schedules.cosine_with_warmup(4e-5, 3, 100)),
    ],
)
def test_schedule_golden(key, schedule):
    expected = golden("lr_schedule")[key]
    ours = jax.jit(schedule)(jnp.arange(len(expected)))
    # The stated absolute tolerance (1e-9) is loose for rates this small: also ask for float32 accuracy.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance("lr_schedule", key))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7 * expected.max())
    np.testing.assert_allclose(schedule(1), expected[1], rtol=1e-5)


def test_single_warmup_and_end():
    schedule = schedules.cosine_with_warmup(2.0, 4, 10, end_factor=0.1)
    np.testing.assert_allclose(schedule(jnp.array([0, 2, 4, 7, 10, 99])), [0, 1, 2, 1.1, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("make", [schedules.cosine_with_warmup, schedules.reference_stage1_schedule])
def test_a_run_shorter_than_its_warmup_stays_in_it(make):
    np.testing.assert_allclose(make(1.0, 100, 20)(jnp.arange(20)), np.arange(20) / 100, rtol=1e-6)


def test_bad_steps_are_refused():
    with pytest.raises(ValueError, match=r"warmup_steps.*-1"):
        schedules.cosine_with_warmup(1.0, -1, 20)
    with pytest.raises(ValueError, match=r"total_steps.*0"):
        schedules.cosine_with_warmup(1.0, 0, 0)
    with pytest.raises(ValueError, match=r"end_factor.*2"):
        schedules.reference_stage1_schedule(1.0, 1, 20, end_factor=2.0)
