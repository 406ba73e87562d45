"""Stage 3's log of prompts: each prompt of an epoch stands in it once, in the data's order, whatever kills the run."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax.batch import KEY_BYTES, PromptBatch, Rollout, key_of, key_row
from alto_jax.checkpoint import runs
from alto_jax.train import loop
from alto_jax.train.progress import going_on, read_metrics
from alto_jax.train.prompt_log import FILE
from tests import fake_stage

NUM_PROMPTS, ROWS, EPOCHS = 16, 4, 3


class _Prompt(grain.transforms.Map):
    def map(self, index):
        return {"record": np.int32(index), "key": key_row(f"photo {index}")}


def numbers():
    """The records in the order of the data, and batches of them."""
    return grain.MapDataset.range(NUM_PROMPTS).seed(1).shuffle().repeat(2 * EPOCHS)


def batches():
    made = lambda rows: PromptBatch(
        None, None, None, None, None, **{n: np.stack([r[n] for r in rows]) for n in rows[0]}
    )
    return iter(numbers().map(_Prompt()).batch(ROWS, batch_fn=made).to_iter_dataset())


def stage(num_missing):
    """The fake stage with rollouts, which replaces half of the groups by those of another rollout."""

    def rollout(params, batch, rng):
        drawn = jax.random.normal(rng, (ROWS, 4))
        return Rollout(batch, drawn, *[batch.record] * 5, components={"x": drawn}, image_tokens=None)

    def loss_fn(params, batch, drawn, step):
        hidden = batch.completion_ids @ params["tokenizer"]["encoder"]["kernel"] @ params["vision"]["kernel"]
        return jnp.mean(jnp.square(hidden - batch.prompt.record[:, None])), ({}, batch.completion_ids)

    half = lambda a, b: jnp.concatenate([a[: a.shape[0] // 2], b[: a.shape[0] // 2]])
    return fake_stage.replace(
        fake_stage.stage(), data=lambda share: batches(), loss_fn=loss_fn, totals=None, draw=None, rollout=rollout,
        refill=lambda a, b: jax.tree.map(half, a, b), num_missing=lambda batch: jnp.int32(num_missing),
        histograms=lambda batch: batch.components,
    )  # fmt: skip


class Killed(BaseException):
    """The process is gone: nothing more is written."""


def kill(patch, owner, name, number):
    """Ends the process after it has done something of a name so many times."""
    original, calls = getattr(owner, name), []

    def dies(*arguments, **options):
        result = original(*arguments, **options)
        calls.append(number)
        if len(calls) == number:
            raise Killed
        return result

    patch.setattr(owner, name, dies)


@pytest.mark.parametrize("rollouts", [1, 2])
def test_each_prompt_once_whatever_kills_the_run(rollouts, tmp_path, monkeypatch):
    """With rollouts that serve two updates, and with dynamic sampling; kills between any two things that are done."""
    steps = 2 * NUM_PROMPTS * EPOCHS // ROWS
    train = {"steps": steps, "batch_size": ROWS, "checkpoint_every": 4}
    config = fake_stage.config(train=train, grpo={"updates_per_rollout": 2, "max_rollouts": rollouts})
    monkeypatch.setattr(loop, "make_stage", lambda config, mesh, directory=None: stage(rollouts - 1))
    redone = []
    beat = (loop.goodput.Account, "beat")  # comes after the save
    for *place, number in ((loop.PromptLog, "take", 2), (*beat, 4), (loop.PromptLog, "flush", 7)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill(patch, *place, number)
            loop.train(config, tmp_path)
        lines = read_metrics(tmp_path, FILE)
        redone.append(bool(lines) and lines[-1]["step"] > max(runs.complete_steps(tmp_path), default=0))
    assert any(redone), "no line was written of an update that was made again"
    assert loop.train(config, tmp_path)["steps"] == steps

    lines = read_metrics(tmp_path, FILE)
    assert [line["step"] for line in lines] == list(range(1, steps, 2))
    records = [record for line in lines for record in line["records"]]
    assert records == [int(n) for n in numbers()][: rollouts * NUM_PROMPTS * EPOCHS]
    for epoch in range(rollouts * EPOCHS):
        assert sorted(records[epoch * NUM_PROMPTS : (epoch + 1) * NUM_PROMPTS]) == list(range(NUM_PROMPTS))
    for line in lines:
        assert line["keys"] == [f"photo {record}" for record in line["records"]]
        half = line["records"][: ROWS // 2] + line["records"][ROWS : ROWS + ROWS // 2]
        assert line.get("kept") == (half if rollouts > 1 else None)


def test_keys_in_batches():
    for key in ("photo 1", "é/ü.json:3#1", "", "x" * KEY_BYTES):
        assert key_row(key).shape == (KEY_BYTES,) and key_of(key_row(key)) == key
    assert key_of(key_row("start/" + "x" * KEY_BYTES + ".json:17")).endswith("xx.json:17")
    assert key_of(key_row("start/" + "x" * KEY_BYTES + ".json:17")).startswith("…x")


def test_a_line_cut_within_a_character_is_dropped(tmp_path):
    whole = '{"step": 1, "keys": ["a\u2028b…"]}\n'
    (tmp_path / FILE).write_bytes((whole + '{"step": 2, "keys": ["b…').encode()[:-1])
    assert [line["step"] for line in read_metrics(tmp_path, FILE)] == [1]
    going_on(tmp_path / FILE, 2).close()
    assert (tmp_path / FILE).read_text() == whole
