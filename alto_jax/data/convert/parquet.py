"""Parquet files as Hugging Face's `datasets` writes them: images, masks and their names in columns of a table.

Images and masks: {"bytes", "path"} (the feature `Image`), plain bytes, or a path. Masks also: COCO's run lengths or
polygons, as values or as JSON text. Names: text, or numbers of a `ClassLabel`. Each may be a list, of a row's objects.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from alto_jax.config import ConfigError
from alto_jax.data import images, masks, rle
from alto_jax.data.bad_data import RecordError, at, one_line, parse_json
from alto_jax.data.convert.annotated import Annotated, Frame, file_mask

_ROWS = 16  # read at a time; an image may have megabytes
# What columns are called where nothing is said.
_USUAL = {
    "image": ("image", "img", "jpg", "png"),
    "mask": ("mask", "masks", "segmentation", "segmentations", "rle", "polygons"),
    "caption": ("caption", "captions", "phrase", "sentence", "sentences", "expression", "text"),
    "label": ("label", "labels", "category", "categories", "class", "name"),
}


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns hold what; "objects.label" is the field `label` of the column `objects`.

    Attributes:
      image: of the picture.
      mask: of the mask or masks.
      caption: of whole phrases; None: `label` says what is shown.
      label: of class names; None: `caption` does, or one name for all.
    """

    image: str
    mask: str
    caption: str | None = None
    label: str | None = None


def read_parquet(
    place: pathlib.Path,
    columns: str = "",
    *,
    label: str = "",
    names: Sequence[str] = (),
    folder: pathlib.Path | None = None,
    rule: str = masks.AUTO,
    exif: Frame = None,
) -> Iterator[Annotated | RecordError]:
    """Tables of images with their masks; a row is one image, with one mask or several.

    Several names stand beside as many masks, each with its own; beside a single mask each is a request of its own. A
    list of polygons is one object, but beside labels as many objects.

    Args:
      place: the file, or a folder of them.
      columns: "image=…,mask=…,label=…" or "…,caption=…", for what is not called as usual.
      label: what all masks show, where no column says it.
      names: of numbered labels; (): those of the table.
      folder: of the files that are named, not held; None: the table's own.
      rule: which values of mask files are foreground (data/masks.py).
      exif: whether mask files are turned by an EXIF orientation of their own.

    Raises:
      ConfigError: no pyarrow, no table, or no such column.
      RecordError: when a mask is drawn, that cannot be read or has another size than its image; what is wrong with a
        row is given in its place.
    """
    files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    if not files:
        raise ConfigError(f"--annotations={place}: no *.parquet in it")
    opened = {file: _open(file) for file in files}  # Note: all of them, so that a wrong one is known at the start.
    wanted = {file: choose_columns(table.schema_arrow.names, columns, label, file) for file, table in opened.items()}
    return _rows(opened, wanted, label, names, folder, rule, exif)


def choose_columns(there: Sequence[str], columns: str, label: str, file: pathlib.Path) -> Columns:
    """The columns of a table: what `columns` says, and the rest by their usual names.

    Args:
      there: the table's columns; file: it, for messages.
      columns, label: as for `read_parquet`.

    Raises:
      ConfigError: there is none, or more than one that it might be.
    """
    given = dict(part.strip().partition("=")[::2] for part in columns.split(",") if part.strip())
    if wrong := [f"{key}={value}" for key, value in given.items() if key not in _USUAL or not value]:
        raise ConfigError(f"--columns={columns}: expected image=…,mask=… and label=… or caption=…, got {wrong[0]!r}")
    if "label" in given and "caption" in given:
        raise ConfigError(f"--columns={columns}: expected label or caption, got both")
    listed = f"{file} has the columns {', '.join(there)}"
    for key, value in given.items():
        if value.partition(".")[0] not in there:
            raise ConfigError(f"--columns={columns}: no column {value!r} of the {key}; {listed}")
    is_named = bool(label or "label" in given or "caption" in given)
    for key in ("image", "mask") if is_named else ("image", "mask", "caption", "label"):
        found = [name for name in _USUAL[key] if name in there]
        if key in given or (not found and key in ("caption", "label")):
            continue
        if len(found) != 1:
            which = f"which is the {key}, {' or '.join(found)}" if found else f"no column of the {key}"
            raise ConfigError(f"--columns={columns}: {which}? Expected {key}=NAME; {listed}")
        given[key] = found[0]
    if not is_named and ("caption" in given) == ("label" in given):
        which = f"caption={given['caption']} or label={given['label']}" if "label" in given else "no names"
        raise ConfigError(f"--columns={columns}: {which}? Expected label=NAME, caption=NAME or --label; {listed}")
    return Columns(**given)


def _open(file: pathlib.Path) -> Any:
    """pyarrow's ParquetFile."""
    try:
        from pyarrow import parquet  # late: only these files need it
    except ImportError as error:
        raise ConfigError("parquet files need pyarrow: pip install 'alto_jax[parquet]'") from error
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # Note: ArrowInvalid is a ValueError.
        raise ConfigError(f"--annotations={file}: cannot be read as parquet: {one_line(error)}") from error


def _rows(
    opened: Mapping[pathlib.Path, Any],
    wanted: Mapping[pathlib.Path, Columns],
    label: str,
    names: Sequence[str],
    folder: pathlib.Path | None,
    rule: str,
    exif: Frame,
) -> Iterator[Annotated | RecordError]:
    for file, table in opened.items():
        columns = wanted[file]
        read = functools.partial(
            _row,
            columns=columns,
            label=label,
            names=names or _class_names(table.schema_arrow, columns.label),
            folder=folder or file.parent,
            rule=rule,
            exif=exif,
        )
        heads = dict.fromkeys(c.partition(".")[0] for c in dataclasses.astuple(columns) if c)
        number = 0
        try:
            for batch in table.iter_batches(batch_size=_ROWS, columns=list(heads)):
                for index in range(batch.num_rows):
                    where = f"{file} row {number}"
                    number += 1
                    try:
                        row = {name: batch.column(name)[index].as_py() for name in heads}
                        found = read(row, where=where)
                    except (RecordError, TypeError, KeyError, ValueError) as error:
                        yield at(where, error)
                        continue
                    yield from found
        except OSError as error:
            yield RecordError(f"{file} row {number}: cannot be read: {one_line(error)}", "truncated file")


def _row(
    row: dict[str, Any],
    columns: Columns,
    label: str,
    names: Sequence[str],
    folder: pathlib.Path,
    rule: str,
    exif: Frame,
    where: str,
) -> list[Annotated]:
    """The objects of a row, by their names."""
    content, path = _file(_field(row, columns.image), folder, "image")
    value, named = _field(row, columns.mask), columns.caption or columns.label
    if value is None:
        raise RecordError(f"column {columns.mask}: expected a mask, got nothing", "missing mask")
    said = label if named is None else _field(row, named)
    objects = _objects(value, apart=columns.label is not None and isinstance(said, list))
    if isinstance(said, list) and len(said) != len(objects) and len(objects) != 1:
        raise RecordError(f"column {named}: expected {len(objects)} names, one of each mask, got {len(said)}")
    if isinstance(said, list) and len(objects) == 1:
        pairs = [(_name(one, names, named), objects[0]) for one in dict.fromkeys(said)]
    else:
        each = said if isinstance(said, list) else [said] * len(objects)
        pairs = [(_name(one, names, named), given) for one, given in zip(each, objects)]
    grouped: dict[str, list[Any]] = {}
    for name, given in pairs:
        grouped.setdefault(name, []).append(given)
    return [
        Annotated(
            path,
            name,
            len(given),
            functools.partial(_draw, given, folder, rule, exif, where),
            None,
            f"{where}, {name!r}",
            content,
            is_phrase=columns.caption is not None,
        )
        for name, given in grouped.items()
    ]


def _field(value: Any, name: str) -> Any:
    """A column of a row, or the field "column.field" in it; of a list, the list of its fields."""
    head, _, rest = name.partition(".")
    if isinstance(value, list):
        return [_field(one, name) for one in value]
    if not isinstance(value, dict) or head not in value:
        raise RecordError(f"no field {head!r} in {value!r:.60}")
    return _field(value[head], rest) if rest else value[head]


def _objects(value: Any, apart: bool) -> list[Any]:
    """What `_draw` draws, one of each object; apart: whether the polygons of a list are objects of their own."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        return _objects(parse_json(value, "the mask"), apart)
    if not isinstance(value, list):
        return [value]
    if not value:
        return []
    if _is_numbers(value):
        return [[value]]
    if all(_is_numbers(part) for part in value):
        if all(len(part) == 2 for part in value):
            return [[[number for point in value for number in point]]]  # corners as pairs
        return [[part] for part in value] if apart else [value]
    return [given for part in value for given in _objects(part, apart=False)]


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(number, int | float) for number in value)


def _draw(
    objects: Sequence[Any], folder: pathlib.Path, rule: str, exif: Frame, where: str, height: int, width: int
) -> np.ndarray:
    """All objects, bool[H, W]."""
    drawn = np.zeros((height, width), bool)
    for given in objects:
        if isinstance(given, list) or (isinstance(given, dict) and "counts" in given):
            drawn |= rle.decode(given, height, width, where)
            continue
        content, path = _file(given, folder, "mask")
        loaded = images.load(path, "mask") if content is None else images.load_bytes(content, where, "mask")
        mask = file_mask(loaded, where if content is not None else str(path), rule, exif)
        if mask.shape != (height, width):
            message = f"{where}: a mask of {mask.shape[1]}x{mask.shape[0]}, but its image is {width}x{height}"
            raise RecordError(message, "size of mask and image")
        drawn |= mask
    return drawn


def _file(value: Any, folder: pathlib.Path, what: str) -> tuple[bytes | None, pathlib.Path]:
    """(content, path) of {"bytes", "path"}, bytes or a path; of an image or mask that is held the path is a name."""
    content, path = value, None
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
    if isinstance(content, str):
        content, path = None, content
    if isinstance(content, bytes):
        return content, pathlib.Path(str(path or ""))
    if content is None and isinstance(path, str) and path:
        return None, folder / path
    raise RecordError(f"expected the {what} as bytes or as a path, got {value!r:.60}", "malformed entry")


def _name(value: Any, names: Sequence[str], column: str | None) -> str:
    """A label or caption as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(names):
            return names[value]
        raise RecordError(f"column {column}: label {value} of {len(names)} names; --names gives them, a line each")
    raise RecordError(f"column {column}: expected a name, got {value!r:.60}")


def _class_names(schema: Any, column: str | None) -> list[str]:
    """The names of a `ClassLabel`, which `datasets` keeps in the table; [] if there are none."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None or column is None:
        return []
    try:
        feature: Any = parse_json(stored, "the table's features")["info"]["features"]
        for part in column.split("."):
            feature = _inner(feature)[part]
        names = _inner(feature).get("names")
    except (RecordError, KeyError, TypeError, AttributeError):
        return []  # Note: numbers then have no names, and the first one says so.
    return [str(name) for name in names] if isinstance(names, list) else []


def _inner(feature: Any) -> Any:
    """What a list of `datasets` is one of: [feature], or {"_type": "Sequence" or "List", "feature"}."""
    while isinstance(feature, list) or (isinstance(feature, dict) and "feature" in feature):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    return feature
