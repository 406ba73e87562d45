"""COCO's instances."""

from collections.abc import Iterator, Mapping
import pathlib
from typing import Any

from alto_jax.data import coco
from alto_jax.data.bad_data import RecordError, at
from alto_jax.data.convert.annotated import Annotated, field, read_json

_ID = (int, float, str)


def read_coco(annotations: pathlib.Path, folder: pathlib.Path) -> Iterator[Annotated | RecordError]:
    """COCO's instances: {"images", "annotations", "categories"}; a crowd is several objects of its name.

    Args:
      annotations: the JSON file.
      folder: of the images.

    Raises:
      RecordError: the file is no such JSON; what is wrong with an entry is given in its place.
    """
    content = read_json(annotations)
    if not isinstance(content, dict) or not all(isinstance(content.get(n), list) for n in ("images", "annotations")):
        raise RecordError(f"{annotations}: expected COCO's lists 'images' and 'annotations'")
    if not isinstance(categories := content.get("categories", []), list):
        raise RecordError(f"{annotations}: expected COCO's list 'categories', got {categories!r:.60}")
    bad: list[RecordError] = []
    infos = _checked(content["images"], f"{annotations} image", {"id": _ID, "file_name": (str,)}, bad)
    names = _by_id(_checked(categories, f"{annotations} category", {"id": _ID, "name": (str,)}, bad), bad)
    ids = {"image_id": _ID, "category_id": _ID}
    of_image: dict[Any, dict[Any, dict[str, dict[str, Any]]]] = {}
    for where, entry in _checked(content["annotations"], f"{annotations} annotation", ids, bad).items():
        of_image.setdefault(entry["image_id"], {}).setdefault(entry["category_id"], {})[where] = entry
    images = _by_id(infos, bad)
    yield from bad
    for image_id, (where, info) in images.items():
        for category, entries in sorted(of_image.pop(image_id, {}).items(), key=lambda item: str(item[0])):
            place = f"{where} ({info['file_name']}), category {category!r}"
            if category not in names:
                yield RecordError(f"{place}: not among the categories")
                continue
            try:
                path, size = coco.find_image(folder / info["file_name"]), coco.stated_size(info, place)
                drawn = [field(entry, "segmentation", (list, dict), own) for own, entry in entries.items()]
            except ValueError as error:
                yield at(place, error)
                continue
            crowds = sum(bool(entry.get("iscrowd")) for entry in entries.values())
            draw = coco.union(drawn)
            yield Annotated(path, names[category][1]["name"], len(entries) + crowds, draw, size, place)
    # Note: of the bad ones, too.
    known = {info["id"] for info in content["images"] if isinstance(info, dict) and isinstance(info.get("id"), _ID)}
    for image_id, by_category in of_image.items():
        if image_id in known:
            continue
        for category, entries in by_category.items():
            more = f" and {len(entries) - 1} more of category {category!r}" if len(entries) > 1 else ""
            yield RecordError(f"{next(iter(entries))}{more}: image_id {image_id!r} is that of no image")


def _checked(
    entries: list[Any], what: str, fields: Mapping[str, tuple[type, ...]], bad: list[RecordError]
) -> dict[str, dict[str, Any]]:
    """The entries that have their fields, by their places ("FILE image 3"); of others, errors are added to `bad`."""
    found: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(entries):
        where = f"{what} {number}"
        try:
            for name, kinds in fields.items():
                field(entry, name, kinds, where)
        except RecordError as error:
            bad.append(error)
            continue
        found[where] = entry
    return found


def _by_id(entries: dict[str, dict[str, Any]], bad: list[RecordError]) -> dict[Any, tuple[str, dict[str, Any]]]:
    """id → (place, entry); of an id that several have, errors are added to `bad`, since either might be meant."""
    found: dict[Any, tuple[str, dict[str, Any]]] = {}
    several = set()
    for where, entry in entries.items():
        if entry["id"] in found:
            bad.append(RecordError(f"{where}: id {entry['id']!r} is that of {found[entry['id']][0]} too"))
            several.add(entry["id"])
        else:
            found[entry["id"]] = where, entry
    return {key: value for key, value in found.items() if key not in several}
