"""RefCOCO-M (Moondream): the expressions of RefCOCO's validation split with masks that are exact to the pixel.

In: `{root}/refcoco-m/data/validation-*.parquet` as published, with `file_name` and `samples` [{"id", "sentences",
"mask": {"size", "counts"}}, …] for each image, and the images of COCO train2014 (those in the file are the same).
Out: `refcoco.Referring`.
"""

import os
import pathlib
from typing import Any

from alto_jax.config import ConfigError
from alto_jax.data import bad_data, coco, files, refcoco
from alto_jax.data.reading import AS_STORED, Reading

FOLDERS = ("refcoco-m/data", "refcoco_m/data", "refcoco-m", "refcoco_m")


def open_refcoco_m(
    root: str | os.PathLike,
    *,
    images: str | os.PathLike | None = None,
    protocol: refcoco.Protocol = "joined",
    reading: Reading = AS_STORED,
) -> refcoco.Referring:
    """All referents of RefCOCO-M, in the order of the files.

    Args:
      root, images, protocol, reading: as in `refcoco.open_refer`.

    Raises:
      ValueError: a file is missing or is not what it should be; the message says what was expected where.
    """
    root = pathlib.Path(root)
    tables = tables_of(files.find(root, FOLDERS, "RefCOCO-M"))
    image_folder, referents = coco.image_folder(root, images), []
    for table in tables:
        rows = read_rows(table)
        for number, row in enumerate(rows):
            samples = row["samples"] if isinstance(row["samples"], list) else [row["samples"]]
            for index, sample in enumerate(samples):
                where = f"{table} row {number}, sample {index}"
                try:
                    segmentation = {"size": list(sample["mask"]["size"]), "counts": sample["mask"]["counts"]}
                    height, width = segmentation["size"]
                    referents.append(
                        refcoco.Referent(
                            where,
                            f"refcoco-m/val/{sample['id']}",
                            image_folder / row["file_name"],
                            refcoco.sentences_of(sample["sentences"]),
                            coco.union([segmentation]),
                            size=(height, width),
                        )
                    )
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    referents.append(refcoco.broken(where, error))
    if not referents:
        raise ValueError(f"{tables[0]}: no sample of RefCOCO-M")
    return refcoco.Referring(referents, protocol, reading=reading, annotations=tables)


def tables_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of the data set in its folder; ValueError if there is none."""
    tables = sorted(folder.glob("validation*.parquet"))
    if not tables:
        raise ValueError(f"RefCOCO-M: {folder} holds no validation*.parquet")
    return tables


def read_rows(table: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file, {"file_name", "samples"}; ValueError if it is cut or another file, or there is no pyarrow."""
    try:
        import pyarrow  # late: only this data set needs it, and it is slow to start
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError("RefCOCO-M needs pyarrow: pip install 'alto_jax[parquet]'") from error
    try:
        return parquet.read_table(table, columns=["file_name", "samples"], use_threads=False).to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        reason = bad_data.one_line(error)
        raise bad_data.RecordError(f"{table}: cannot be read as RefCOCO-M: {reason}", "unreadable file") from error
