"""COCO's instances."""

from collections.abc import Iterator
import pathlib
from typing import Any

from alto_jax.data import coco
from alto_jax.data.bad_data import RecordError, at
from alto_jax.data.convert.annotated import Annotated, read_json


def read_coco(annotations: pathlib.Path, folder: pathlib.Path) -> Iterator[Annotated | RecordError]:
    """COCO's instances: {"images", "annotations", "categories"}; crowds count where a name has nothing else.

    Args:
      annotations: the JSON file.
      folder: of the images.

    Raises:
      RecordError: the file is no such JSON; what is wrong with an entry is given in its place.
    """
    content = read_json(annotations)
    if not isinstance(content, dict) or not all(isinstance(content.get(n), list) for n in ("images", "annotations")):
        raise RecordError(f"{annotations}: expected COCO's lists 'images' and 'annotations'")
    names = {c.get("id"): c.get("name") for c in content.get("categories") or () if isinstance(c, dict)}
    of_image: dict[Any, dict[Any, list]] = {}
    for entry in content["annotations"]:
        if isinstance(entry, dict):
            of_image.setdefault(entry.get("image_id"), {}).setdefault(entry.get("category_id"), []).append(entry)
    for number, info in enumerate(content["images"]):
        where = f"{annotations} image {number}"
        if not isinstance(info, dict) or not isinstance(info.get("file_name"), str):
            yield RecordError(f"{where}: expected an entry with file_name, got {info!r:.60}")
            continue
        for category, entries in sorted(of_image.get(info.get("id"), {}).items(), key=lambda item: str(item[0])):
            label = names.get(category)
            place = f"{where} ({info['file_name']}), category {category!r}"
            if not isinstance(label, str):
                yield RecordError(f"{place}: not among the categories")
                continue
            try:
                path, size = coco.find_image(folder / info["file_name"]), coco.stated_size(info, place)
                draw = coco.union(coco.of_target(entries))
            except (RecordError, TypeError, KeyError) as error:
                yield at(place, error)
                continue
            yield Annotated(path, label, len(entries), draw, size, place)
