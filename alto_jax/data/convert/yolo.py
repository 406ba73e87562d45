"""YOLO's segments, and files of class names."""

from collections.abc import Iterator
import pathlib

import numpy as np

from alto_jax.config import ConfigError
from alto_jax.data import rle
from alto_jax.data.bad_data import RecordError, at
from alto_jax.data.convert.annotated import Annotated, pictures


def read_yolo(folder: pathlib.Path, of_images: pathlib.Path, names: list[str]) -> Iterator[Annotated | RecordError]:
    """YOLO's segments: a text file an image, lines of a class and x y x y … in 0..1.

    Args:
      folder: of the text files.
      of_images: of the images, laid out as the text files.
      names: of the classes.

    Raises:
      RecordError: never; what is wrong with a file is given in its place.
    """
    for path in pictures(of_images):
        file = folder / path.relative_to(of_images).with_suffix(".txt")
        if not file.exists():
            continue  # Note: that is how these data say that an image holds nothing.
        found: dict[str, list[np.ndarray]] = {}
        try:
            for number, line in enumerate(file.read_text().splitlines(), 1):
                try:
                    values = [float(word) for word in line.split()]
                except ValueError as error:
                    raise RecordError(f"line {number}: expected numbers, got {line!r:.60}") from error
                if not values:
                    continue
                if len(values) < 7 or len(values) % 2 == 0:
                    raise RecordError(f"line {number}: expected a class and three corners or more, got {line!r:.60}")
                if values[0] not in range(len(names)):
                    raise RecordError(f"line {number}: class {line.split()[0]} of {len(names)} names")
                corners = np.array(values[1:]).reshape(-1, 2)
                if not np.all((corners >= -0.01) & (corners <= 1.01)):
                    raise RecordError(f"line {number}: expected coordinates in 0..1, got {line!r:.60}")
                found.setdefault(names[int(values[0])], []).append(corners)
        except (RecordError, ValueError) as error:
            yield at(file, error)
            continue
        for label, parts in sorted(found.items()):

            def draw(height: int, width: int, parts: list = parts, file: pathlib.Path = file) -> np.ndarray:
                scaled = [(corners * (width, height)).reshape(-1).tolist() for corners in parts]
                return rle.decode(scaled, height, width, str(file))

            yield Annotated(path, label, len(parts), draw, None, f"{file}, {label!r}")


def read_names(file: str) -> list[str]:
    """The class names of a text file (a line each), or of `names:` in YOLO's data.yaml (a list, or numbers to names).

    Raises:
      ConfigError: no names there.
    """
    import yaml  # type: ignore[import-untyped]  # late: only these need it

    try:
        content = pathlib.Path(file).read_text()
        if not file.endswith((".yaml", ".yml")):
            found = [line.strip() for line in content.splitlines() if line.strip()]
        else:
            names = yaml.safe_load(content)["names"]
            found = [str(names[i]) for i in range(len(names))]
    except (OSError, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--names={file}: expected class names, a line each, or a YAML's `names`: {error!r}"
        ) from error
    if not found:
        raise ConfigError(f"--names={file}: holds no names")
    return found
