"""Fields of a config.json, which users' files may give any type: each is read with what it must be."""

from collections.abc import Mapping
from typing import Any

from alto_jax.config import ConfigError

from .files import short


class Stated:
    """A config.json (or a part of it), of which any field may be of any type; `agree` compares one with the weights.

    Args:
      values: the fields. where: file and part, for messages. names: our field → its name there, where it differs.
    """

    def __init__(self, values: Any, where: str, names: Mapping[str, str] | None = None):
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected a group of fields, got {short(values)}")
        self.values, self.where, self._names = values, where, names or {}

    def name(self, field: str) -> str:
        """The dotted name of a field, for messages."""
        return f"{self.where}.{self._names.get(field, field)}"

    def get(self, field: str) -> Any:
        """The field, None where it is missing; [n, n], height and width of a square, is n."""
        value = self.values.get(self._names.get(field, field))
        is_square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
        return value[0] if is_square else value

    def agree(self, field: str, found: Any, key: str) -> Any:
        stated = self.get(field)
        if stated is not None and (stated != found or isinstance(stated, bool) != isinstance(found, bool)):
            raise ConfigError(f"{self.name(field)}: says {short(stated)}, but the weights ({key}) say {found!r}")
        return found

    def only(self, field: str, allowed: Any) -> None:
        stated = self.get(field)
        if stated is not None and stated != allowed:
            raise ConfigError(f"{self.name(field)}: expected {allowed!r} (what is implemented), got {short(stated)}")

    def whole(self, field: str, default: int | None = None, low: int = 1) -> int:
        """A whole number of at least `low`; without a default it must be there."""
        value = default if self.get(field) is None else self.get(field)
        if value is None:
            raise ConfigError(f"{self.name(field)}: missing, and the weights do not tell it")
        if type(value) is not int or not low <= value < 2**31:
            raise ConfigError(f"{self.name(field)}: expected a whole number of at least {low}, got {short(value)}")
        return value

    def number(self, field: str, default: float | None = None, low: float = 0.0) -> float:
        """A finite number of at least `low`; without a default it must be there."""
        value = default if self.get(field) is None else self.get(field)
        if value is None:
            raise ConfigError(f"{self.name(field)}: missing, and the weights do not tell it")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value < 1e30:
            raise ConfigError(f"{self.name(field)}: expected a number of at least {low:g}, got {short(value)}")
        return float(value)

    def flag(self, field: str) -> bool | None:
        """True, False, or None where it is missing."""
        value = self.get(field)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self.name(field)}: expected true or false, got {short(value)}")
        return value

    def group(self, field: str, names: Mapping[str, str] | None = None, sep: str = ".") -> "Stated":
        """The fields below a field; none where it is missing."""
        value = self.get(field)
        return Stated({} if value is None else value, f"{self.where}{sep}{self._names.get(field, field)}", names)
