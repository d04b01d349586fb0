"""Entries: what a file says of its model, checked as it is read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

LARGEST = 2**24  # of any size that a file states: products of two still fit into 64 bits


class Entries:
    """The entries of a config.json or of GGUF metadata. None counts as absent.

    Args:
        name: of the file, as errors name it.
        values: the entries by their keys.
        defaults: what counts where an entry is absent; without one, an absent entry is an error.
        prefix: what all keys begin with.
        noun: what an entry is called, with a space behind it.

    Raises:
        ValueError: when an entry is read that is absent, of another type or out of range. It names file and key.
    """

    def __init__(
        self,
        name: str,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        prefix: str = "",
        noun: str = "",
    ):
        self.name = name
        self._values = values
        self._defaults = defaults or {}
        self._prefix = prefix
        self._noun = noun

    def __contains__(self, key: str) -> bool:
        """Whether the entry is there and not None."""
        return self._values.get(self._prefix + key) is not None

    def with_defaults(self, defaults: Mapping[str, Any]) -> Entries:
        """The same entries, where others count for those that are absent."""
        return Entries(self.name, self._values, defaults, self._prefix, self._noun)

    def with_own(self, values: Mapping[str, Any]) -> Entries:
        """The same entries, with others in the place of some."""
        own = {self._prefix + key: value for key, value in values.items()}
        return Entries(self.name, {**self._values, **own}, self._defaults, self._prefix, self._noun)

    def is_null(self, key: str) -> bool:
        """Whether the entry is there and None, which some files mean by it."""
        return self._prefix + key in self._values and key not in self

    def keys(self) -> list[str]:
        """The keys of all entries."""
        return list(self._values)

    def values(self) -> list:
        """All entries, whatever they are."""
        return list(self._values.values())

    def get(self, key: str, default=None):
        """An entry as it is."""
        if key in self:
            return self._values[self._prefix + key]
        return self._defaults.get(key, default)

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
        """A whole number from least to most."""
        value = self._stated(key, default)
        if type(value) is not int:
            raise self.wrong(key, value, "a whole number")
        if not least <= value <= most:
            raise self.wrong(key, value, f"at least {least}" if value < least else f"at most {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._stated(key, default)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.wrong(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._stated(key, default)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._stated(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value

    def array(self, key: str, kinds: type | tuple[type, ...], default: list | None = None) -> list:
        """A list whose values are all of these types."""
        values = self._stated(key, default)
        if not isinstance(values, (list, tuple)) or not set(map(type, values)) <= set(
            kinds if isinstance(kinds, tuple) else (kinds,)
        ):
            names = kinds.__name__ if isinstance(kinds, type) else " or ".join(kind.__name__ for kind in kinds)
            raise self.wrong(key, values, f"a list of {names}")
        return list(values)

    def part(self, key: str) -> Entries:
        """The entries of an entry; none where it is absent."""
        values = self.get(key)
        if values is not None and not isinstance(values, dict):
            raise self.wrong(key, values, "entries of its own")
        return Entries(self.name, {f"{self._prefix}{key}.{name}": entry for name, entry in (values or {}).items()},
                       prefix=f"{self._prefix}{key}.", noun=self._noun)  # fmt: skip

    def wrong(self, key: str, value, expected: str) -> ValueError:
        """The error for an entry that is not what was expected."""
        found = repr(value)
        found = found if len(found) <= 60 else found[:57] + "..."
        name = f"{self._noun}{self._prefix}{key}"
        return ValueError(f"{self.name} is corrupt: its {name} must be {expected}, got {found}")

    def _stated(self, key: str, default):
        value = self.get(key, default)
        if value is None:
            raise ValueError(f"{self.name} is incomplete: it has no {self._noun}{self._prefix + key!r}")
        return value
