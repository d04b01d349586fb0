"""Registries: the members of a folder by name, each registered in its own file, so that nobody keeps a list of them.

A folder has one table, its files add to it, and everybody else reads it::

    RULES = Registry("pyspec.acceptance")  # in pyspec/acceptance/__init__.py
    RULES.register("exact", ExactAcceptance, "every tree; the text of plain decoding")  # in pyspec/acceptance/exact.py
    RULES["exact"], list(RULES), RULES.summaries, RULES.named("acceptance", name, "or a rule")  # anywhere

The files of the folder, and of folders in it, are imported when the table is first read, not when pyspec is. A file
outside of pyspec adds its members by being imported.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TypeVar

from pyspec.arguments import described

Member = TypeVar("Member")


class Registry(Mapping[str, Member]):
    """The members that the files of a package register, in the order of their names."""

    def __init__(self, package: str):
        self._package, self._is_complete = package, False
        self._members: dict[str, Member] = {}
        self._summaries: dict[str, str] = {}

    def register(self, name: str, member: Member, summary: str) -> None:
        """Adds a member with the line about it that tables have; raises ValueError if the name is taken."""
        if name in self._members:
            raise ValueError(f"{name!r} is registered in {self._package} already, as {self._members[name]}")
        self._members[name], self._summaries[name] = member, summary

    def named(self, argument: str, name: object, other: str) -> Member:
        """The member of a name. Raises ValueError, or TypeError for what is no string, naming argument and choices."""
        if not isinstance(name, str) or name not in self:
            error = ValueError if isinstance(name, str) else TypeError
            raise error(f"{argument} must be one of {', '.join(self)}, {other}, got {described(name)}")
        return self[name]

    @property
    def summaries(self) -> dict[str, str]:
        """The line about each member."""
        return {name: self._summaries[name] for name in self}

    def __getitem__(self, name: str) -> Member:
        return self._complete()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._complete()))

    def __len__(self) -> int:
        return len(self._complete())

    def _complete(self) -> dict[str, Member]:
        if not self._is_complete:
            for module in pkgutil.walk_packages(import_module(self._package).__path__, f"{self._package}."):
                import_module(module.name)
            self._is_complete = True
        return self._members
