"""Objects that are below half everywhere at the model's mask size: they stay, by one rule in all stages."""

import jax.numpy as jnp
import numpy as np
import pytest

from alto_jax import rewards
from alto_jax.data import prepare, transforms
from alto_jax.data.chat_examples import chat_example, prompt_example
from alto_jax.data.examples import mask_example
from alto_jax.data.sa1b import Sa1bMasks
from alto_jax.mllm import text
from tests.data import replicas

HEIGHT, WIDTH, SIZE = 300, 400, 64
SHAPES = {"dot": (np.s_[150:151, 201:202]), "square": np.s_[150:152, 201:203], "line": np.s_[:, 201:202],
          "corner": np.s_[299:, 399:]}  # fmt: skip


def tiny(shape: str) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[SHAPES[shape]] = 255
    return mask


@pytest.fixture(scope="module")
def tok():
    return text.TextTokenizer.train_builtin(["the red apple on the left"] * 9, 300, 64)


def targets(mask: np.ndarray, tok) -> dict[str, np.ndarray]:
    """The target of each stage, float32[SIZE, SIZE]."""
    image = np.zeros((*mask.shape, 3), np.uint8)
    record = {"key": "k", "image": image, "mask": mask, "masks": [mask]}
    record["conversations"] = [{"from": "human", "value": text.question("it", adaptive=True)},
                               {"from": "gpt", "value": text.answer(adaptive=True)}]  # fmt: skip
    sizes = dict(vision_size=28, image_size=64, mask_size=SIZE, num_image_tokens=4, system=None)
    chat = chat_example(record, tok, **sizes, max_length=200, num_latent_tokens=8, max_masks=1)
    prompt = prompt_example(record, tok, **sizes, max_prompt_length=150, answer_prefix="", template=0)
    return {"stage1": mask_example(record, 64, SIZE)[1], "stage2": chat["masks"][0], "stage3": prompt["mask"]}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_tiny_target_stays_and_an_empty_answer_gets_nothing(shape, tok):
    mask = tiny(shape)
    assert transforms.squash(mask, SIZE).max() <= 127  # It would vanish.
    for stage, target in targets(mask, tok).items():
        kept, place = target > 0.5, np.argwhere(mask)
        assert set(np.unique(target)) == {0.0, 1.0}
        side = (max(HEIGHT, WIDTH), max(HEIGHT, WIDTH)) if stage == "stage1" else (HEIGHT, WIDTH)
        touched = {(y * SIZE // side[0], x * SIZE // side[1]) for y, x in place.tolist()}
        assert set(map(tuple, np.argwhere(kept).tolist())) == touched
        batch, valid = jnp.array(target)[None], jnp.array([[True, True]])
        answers = jnp.stack([jnp.zeros_like(batch[0]), batch[0]])[None]
        assert rewards.iou_reward(answers, batch, valid).tolist() == [[0.0, 1.0]]


def test_targets_that_do_not_vanish_are_left_as_they_are(tok):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[100:140, 100:180], mask[5, 5] = 255, 255
    found = targets(mask, tok)
    np.testing.assert_array_equal(found["stage2"], transforms.squash(mask, SIZE).astype(np.float32) / 255)
    np.testing.assert_array_equal(found["stage3"], found["stage2"])
    assert 0 < found["stage2"][1, 0] < 0.5


def test_prepared_masks_are_kept_by_the_same_rule():
    faint = np.zeros((SIZE, SIZE), np.uint8)  # as earlier versions stored it
    faint[3, 4:6] = 90, 12
    kept = transforms.soft_mask(faint, SIZE)
    assert np.argwhere(kept).tolist() == [[3, 4]] and kept.max() == 1.0

    class One:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": text.answer(adaptive=True)}]
            return {
                "key": "k",
                "image": np.zeros((HEIGHT, WIDTH, 3), np.uint8),
                "masks": [tiny("dot")],
                "conversations": turns,
            }

    sizes = {"vision_size": 28, "image_size": 64, "mask_size": SIZE}
    job = prepare.Job("x", "chat", One(), sizes, "png", 4, 0)
    stored = prepare.prepared.decode(prepare.example(job, One()[0])["masks"][0])
    np.testing.assert_array_equal(stored, transforms.squash_mask(tiny("dot"), SIZE))
    assert stored.max() == 255


def test_an_empty_target_is_a_bad_record(tok):
    with pytest.raises(ValueError, match="record k: the mask is empty"):
        targets(np.zeros((HEIGHT, WIDTH), np.uint8), tok)


def test_sa1b_masks_do_not_vanish_when_the_long_side_is_limited(tmp_path):
    replicas.write_sa1b(tmp_path, 1)
    import json

    file = tmp_path / "sa_0.json"
    content = json.loads(file.read_text())
    line = np.zeros((64, 64), bool)
    line[:, 31] = True
    content["annotations"] = [{"id": 0, "area": 64, "segmentation": replicas.runs(line, "compressed")}]
    file.write_text(json.dumps(content))
    mask = Sa1bMasks(tmp_path, train=False, max_side=16)[0]["mask"]
    assert (mask[:, 7] == 255).all() and mask.sum() == 16 * 255
