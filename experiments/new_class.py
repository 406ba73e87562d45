"""Pictures and masks of a thing that alto-tiny was never taught, as files: images/*.png beside masks/*.png.

    python -m experiments.new_class --out runs/umbrellas --name umbrella --pictures 400

Comes in: a name of the built-in catalogue that is not among the forty of training. Goes out: pictures that hold exactly
one such thing, among up to three others by those forty names, and its mask under the picture's name. What
docs/finetune.md works on; nothing in it knows more than image and mask files.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image

from alto_jax import cli
from alto_jax.config import ConfigError
from alto_jax.data.composition import Scene, Scenes, ScenesConfig
from alto_jax.evaluate.scene_answers import VOCABULARY

_SCENES = {"image_size": 128, "min_objects": 2, "max_objects": 4, "min_size": 0.25, "max_size": 0.6}
_SEED = 17  # other scenes than those of training and evaluation
_MOST = 60  # scenes that are tried for each picture, where one in twenty holds the thing


def write(out: pathlib.Path, name: str, pictures: int) -> None:
    """Writes `pictures` images and masks to the folder.

    Raises:
      ConfigError: a name that training knew, or that the catalogue lacks.
    """
    known = Scenes(ScenesConfig(shapes="train", vocabulary=VOCABULARY)).names
    if name in known:
        raise ConfigError(f"--name={name}: alto-tiny was taught that; choose another than {', '.join(known)}")
    try:
        options = {"shapes": "train", "vocabulary": (name, *known), "seed": _SEED, "num_scenes": pictures * _MOST}
        scenes = Scenes(ScenesConfig(**_SCENES, **options))
    except ValueError as error:
        raise ConfigError(f"--name={name}: no such thing among the built-in pictures of training") from error
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    written = 0
    for number in range(len(scenes)):
        scene = scenes[number]
        if len(_things(scene, name)) != 1 or len(scene.objects) < 2:
            continue
        mask = scene.union(_things(scene, name))
        Image.fromarray(scene.image).save(out / "images" / f"{name}_{written:04d}.png")
        Image.fromarray(np.asarray(mask)).save(out / "masks" / f"{name}_{written:04d}.png")
        written += 1
        if written == pictures:
            return
    raise ConfigError(f"--pictures={pictures}: only {written} of {len(scenes)} scenes hold one {name}")


def _things(scene: Scene, name: str) -> list[int]:
    return [index for index, thing in enumerate(scene.objects) if thing.name == name]


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m experiments.new_class", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--name", default="umbrella", help="of the thing (default: umbrella)")
    parser.add_argument("--pictures", type=int, default=400, metavar="N")
    options = parser.parse_args()
    cli.check_paths({"--out": options.out})
    if options.pictures < 1:
        raise ConfigError(f"--pictures={options.pictures}: expected at least 1")
    write(pathlib.Path(options.out), options.name, options.pictures)
    print(f"{options.pictures} images and masks in {options.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
