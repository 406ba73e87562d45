"""The small files of PyTorch (configuration, tokenizer, code) that lie where a run's weights came from."""

import json
import pathlib

TORCH_FILES = "torch_files"  # The folder of a converted checkpoint that holds them.


def find_torch_files(root: pathlib.Path) -> pathlib.Path | None:
    """The PyTorch files kept with a checkpoint, or with the one that its run started from, and so on back.

    Args:
      root: a run's directory.

    Raises:
      ValueError: a config.json on the way that is not readable as JSON.
    """
    for _ in range(8):
        if (root / TORCH_FILES).is_dir():
            return root / TORCH_FILES
        file, start = root / "config.json", None
        if file.is_file():
            try:
                config = json.loads(file.read_bytes())
            except ValueError as error:
                raise ValueError(f"{file}: not readable as JSON: {error}") from error
            start = config.get("init_from") if isinstance(config, dict) else None
        if not isinstance(start, str) or not start or not pathlib.Path(start).is_dir():
            return None
        root = pathlib.Path(start)
    return None
