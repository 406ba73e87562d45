"""Training from the command line.

    python -m alto_jax.main --config=configs/stage1.py:tiny --workdir=DIR [--config.optim.lr=1e-3] [--mode=evaluate]

FILE is a path, or the name of a configuration that comes with the package (`--config=stage1.py:tiny`). Its
`get_config(size)` gives the fields; every field, also one that the file leaves at
its default, can be set with --config.GROUP.FIELD=VALUE.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import importlib.util
import pathlib
import sys
import types
import typing
from typing import Any

from absl import flags

from alto_jax import cli
from alto_jax.config import ConfigError, to_dict
from alto_jax.parallel import distributed
from alto_jax.storage.bucket import checked

if typing.TYPE_CHECKING:
    from alto_jax.train import early

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory: checkpoints, metrics, results.")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate"], "Train (and evaluate at the end), or evaluate the newest checkpoint."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "none",
    ["none", "env", "auto"],
    "How processes form one run, see distributed.py.",
)
_PROFILE = flags.DEFINE_boolean(
    "profile", False, "Trace five steps into WORKDIR/profile (or as many as --config.train.profile_steps says)."
)
_USAGE = "usage: python -m alto_jax.main --config=FILE[:SIZE] --workdir=DIR [--config.GROUP.FIELD=VALUE ...]"


def load_config(spec: str) -> Any:
    """The ConfigDict of a configuration file, completed with the defaults of all fields.

    Args:
      spec: FILE or FILE:SIZE; FILE is a path, or NAME.py or configs/NAME.py of the package's own where there is no such
        file.

    Raises:
      ConfigError: no such file, no `get_config` in it, or values that do not fit.
    """
    import ml_collections  # late: keeps the start fast

    file, _, argument = spec.partition(":")
    path = _find_config(file)
    if path is None:
        raise ConfigError(f"--config={spec}: no such file {file}")
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"--config={spec}: expected a Python file, got {file}")
    module = importlib.util.module_from_spec(module_spec)
    with _neighbours(path):
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"--config={spec}: {file} has no function get_config")
        values = module.get_config(argument) if argument else module.get_config()
    plain = values.to_dict()
    if "stages" in plain:
        for name in plain["stages"]:
            plain[name] = _completed(plain[name], f"config.{name}")
    else:
        plain = _completed(plain, "config")
    return ml_collections.ConfigDict(plain)


def _shipped() -> pathlib.Path:
    """The folder of the configurations that come with the package: of its checkout, or inside an installed wheel."""
    package = pathlib.Path(__file__).resolve().parent
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _find_config(file: str) -> pathlib.Path | None:
    """A file by its path, else NAME.py or configs/NAME.py of those that come with the package; None: no such file."""
    path = pathlib.Path(file)
    if not path.is_file() and path.parent in (pathlib.Path(), pathlib.Path("configs")):
        path = _shipped() / path.name
    return path.resolve() if path.is_file() else None


@contextlib.contextmanager
def _neighbours(path: pathlib.Path) -> Iterator[None]:
    """While a configuration file is read, `configs.NAME` is its neighbour, or comes with the package.

    An installed package has no module `configs` of its own, which would be in the way of other people's.
    """
    folders, places = [_shipped()], []
    if path.parent != folders[0]:
        places = [str(path.parent.parent)]
        folders = [path.parent.parent / "configs", pathlib.Path("configs").resolve(), *folders]
    package = types.ModuleType("configs")
    package.__path__ = [str(folder) for folder in dict.fromkeys(folders) if folder.is_dir()]
    ours = lambda name: name.partition(".")[0] == "configs"
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
    before = list(sys.path)
    sys.modules["configs"], sys.path[:0] = package, places
    try:
        yield
    finally:
        sys.path[:] = before
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(others)


def _completed(plain: dict, where: str) -> dict:
    """The fields with all defaults, as values that flags can change."""
    from alto_jax.config import build  # late: keeps the start fast
    from alto_jax.experiment import ExperimentConfig

    return _flaggable(build(ExperimentConfig, plain, where))


def _flaggable(value: Any) -> Any:
    """Dataclasses as dicts; an optional plain field that is None as a placeholder of its type."""
    from ml_collections import config_dict  # late: keeps the start fast

    if not dataclasses.is_dataclass(value):
        return value
    hints, fields = typing.get_type_hints(type(value)), {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if item is None:
            plain = [t for t in typing.get_args(hints[field.name]) if t in (int, float, str)]
            item = config_dict.placeholder(plain[0]) if plain else None
        fields[field.name] = _flaggable(item)
    return fields


def _check_fields(values: Mapping, arguments: Sequence[str]) -> None:
    """Raises ConfigError for a --config.GROUP.FIELD that `values` lacks (ml_collections ends in a stack trace)."""
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if not name.startswith("config."):
            continue
        group, where = values, "config"
        for part in name.split("[")[0].split(".")[1:]:
            if not isinstance(group, Mapping) or part not in group:
                known = ", ".join(sorted(group)) if isinstance(group, Mapping) else f"none, {where} is a value"
                raise ConfigError(f"--{where}.{part}: unknown field; known: {known}")
            group, where = group[part], f"{where}.{part}"


def read_config(spec: str, changes: Sequence[str]) -> dict:
    """The values of a configuration file with those of the command line in their place.

    Args:
      spec: FILE[:SIZE].
      changes: `--config.GROUP.FIELD=VALUE` arguments.

    Raises:
      ConfigError: no such file or field, a value of the wrong type, an argument of another kind.
    """
    from ml_collections import config_flags  # late: keeps the start fast

    values = load_config(spec)
    _check_fields(values.to_dict(), changes)
    own, arguments = flags.FlagValues(), ["", *changes]
    holder = config_flags.DEFINE_config_dict("config", values, flag_values=own, sys_argv=arguments)
    try:
        rest = own(arguments)
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}")
    return holder.value.to_dict()


def _divide(arguments: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """(the configuration's file, changes of its fields, the other flags); a value may follow after a space or a =."""
    spec, changes, others, rest = "", [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        name, is_given, value = argument.partition("=")
        name = name.lstrip("-")
        if argument.startswith("-") and (name == "config" or name.startswith("config.")):
            if not is_given:
                if not rest:
                    raise ConfigError(f"{argument}: a value is missing")
                value = rest.pop(0)
            if name == "config":
                spec = value
            else:
                changes.append(f"--{name}={value}")
        else:
            others.append(argument)
    return spec, changes, others


def main() -> int:
    """Parses the command line and runs."""

    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in sys.argv[1:]):
        print(f"{__doc__}\n{_USAGE}\n\n{flags.FLAGS.get_help() if '--helpfull' in sys.argv else _own_help()}")
        return 0
    spec, changes, others = _divide(sys.argv[1:])
    if not spec:
        raise ConfigError(f"--config is required; {_USAGE}")
    try:
        rest = flags.FLAGS([sys.argv[0], *others])
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; {_USAGE}")
    if not _WORKDIR.value:
        raise ConfigError(f"--workdir is required; {_USAGE}")
    checked(_WORKDIR.value, "--workdir")
    from alto_jax.train import early  # late: keeps the start fast

    # Note: a start that dies while it waits for the others would else be in no account.
    is_noted = _MODE.value == "train" and early.is_first(_DISTRIBUTED.value)
    noted = early.Note(_WORKDIR.value, [spec, changes]) if is_noted else None
    # Note: before the configuration is read, which may already touch JAX.
    distributed.initialize(_DISTRIBUTED.value)
    try:
        return _run(spec, changes, _WORKDIR.value, noted)
    except (ValueError, OSError, ImportError):
        if noted:
            noted.take_back()
        raise


def _run(spec: str, changes: Sequence[str], workdir: str, noted: "early.Note | None") -> int:
    """`main` after the processes have joined."""
    values = read_config(spec, changes)
    if "stages" in values:
        distributed.require_alone(f"--config={spec}: several stages in a row")
        from alto_jax import quickstart  # late: keeps the start fast

        if noted:
            noted.drop()
        quickstart.run(values, workdir)
        return 0
    from alto_jax.experiment import make_experiment  # late: keeps the start fast
    from alto_jax.train.goodput import process_age
    from alto_jax.train.loop import evaluate, train

    if _PROFILE.value:
        values["train"]["profile_steps"] = values["train"]["profile_steps"] or 5
    config = make_experiment(values)
    with distributed.explained():
        # Note: before anything that needs all processes, since those that differ would wait for each other for ever.
        distributed.require_same("command", _agreed(config))
        if _MODE.value == "train":
            train(config, workdir, age=process_age(), noted=noted)
            if noted:
                noted.drop()  # Note: also where the run was already complete.
        else:
            evaluate(config, workdir)
    return 0


def _agreed(config: Any) -> dict[str, Any]:
    """What all processes of a run must have alike."""
    import jax  # late: keeps the start fast

    import alto_jax

    versions = {"alto_jax": alto_jax.__version__, "jax": jax.__version__}
    return {"--mode": _MODE.value, "config": to_dict(config), "version of": versions}


def _own_help() -> str:
    return flags.FLAGS.module_help(sys.modules[__name__])


def command() -> None:
    """The installed command: `main`, with one line for bad input."""
    cli.run(main)


if __name__ == "__main__":
    command()
