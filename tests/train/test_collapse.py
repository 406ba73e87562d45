"""Warnings of collapse: said once, again after a recovery, and about the right stage alone."""

import pytest

from alto_jax.train import collapse


@pytest.mark.parametrize("sign", collapse.SIGNS, ids=lambda sign: f"{sign.stages[-1]}-{sign.metric}")
def test_each_sign_is_told_once_until_it_is_gone(sign):
    beyond, fine = (sign.limit * 2, sign.limit / 2) if sign.above else (sign.limit / 2, sign.limit * 2)
    watch = collapse.Watch(sign.stages[0], 100)
    assert watch.warnings(5, {sign.metric: beyond}) == []  # at the start everything is alike
    (text,) = watch.warnings(50, {f"eval/{sign.metric}": beyond, "loss": 1.0})
    assert sign.text in text and sign.metric in text
    assert watch.warnings(60, {sign.metric: beyond}) == []
    assert watch.warnings(70, {sign.metric: fine}) == [] == watch.warnings(75, {})
    assert len(watch.warnings(80, {sign.metric: beyond})) == 1
    assert collapse.Watch("stage0", 100).warnings(50, {sign.metric: beyond}) == []
