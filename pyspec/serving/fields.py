"""Fields: a request's fields, each checked where it is read, and none left unread."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from pyspec.arguments import described
from pyspec.serving.refusals import Refused


def parse_body(data: bytes) -> dict:
    """The JSON object of a request's body; raises Refused for anything else."""
    try:
        text = data.decode("utf-8")
        body = json.loads(text, parse_constant=_no_number)
        if "\\u" in text:  # the one way to write half a character, which no answer could quote
            json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"the body must be UTF-8, got byte 0x{data[error.start]:02x} at {error.start}") from None
    except UnicodeEncodeError:
        raise Refused("the body's strings must be text that UTF-8 can hold, got half a character (\\ud800)") from None
    except RecursionError:
        raise Refused("the body must be JSON that is not nested as deeply") from None
    except ValueError as error:
        raise Refused(f"the body must be JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(f"the body must be a JSON object, got {_kind(body)}")
    return body


def _no_number(name: str):
    raise ValueError(f"{name} is no number of JSON")


def _kind(value) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    names = {str: "a string", int: "an integer", float: "a number", list: "an array", dict: "an object"}
    return names[type(value)]


def wrong(param: str, wanted: str, value) -> Refused:
    """The refusal of a field that holds something else than what is wanted."""
    got = _kind(value) if isinstance(value, (dict, list, str)) else described(value)
    return Refused(f"'{param}' must be {wanted}, got {got}", param=param, code="invalid_value")


class Fields:
    """The fields of a request, or of an object in one. null is as good as leaving a field out.

    Each method takes a field out and returns it checked, or `default` where it is not there. They raise Refused.

    Args:
        body: the object.
        path: what the names of its fields begin with in errors.
    """

    def __init__(self, body: Mapping[str, Any], path: str = ""):
        self._left = {name: value for name, value in body.items() if value is not None}
        self._path = path

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def name(self, name: str) -> str:
        """A field's name in errors."""
        return self._path + name

    def any(self, name: str, default=None) -> Any:
        return self._left.pop(name, default)

    def text(self, name: str, default: str | None = None) -> str | None:
        return self._of(name, str, "a string", default)

    def flag(self, name: str, default: bool = False) -> bool:
        return self._of(name, bool, "a boolean", default)

    def mapping(self, name: str) -> dict | None:
        return self._of(name, dict, "an object", None)

    def array(self, name: str) -> list | None:
        return self._of(name, list, "an array", None)

    def integer(self, name: str, least: int, most: int, default: int | None = None) -> int | None:
        return self._number(name, int, "an integer", least, most, default)

    def number(self, name: str, least: float, most: float, default: float | None = None) -> float | None:
        return self._number(name, (int, float), "a number", least, most, default)

    def one_of(self, name: str, choices: Collection, default=None) -> Any:
        """A field that is one of some values; others are not supported."""
        value = self._left.pop(name, default)
        if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
            listed = " or ".join(json.dumps(choice) for choice in choices if choice is not None)
            raise Refused(
                f"'{self.name(name)}' must be {listed} on this server, got {described(value)}",
                param=self.name(name),
                code="unsupported_value",
            )
        return value

    def finish(self, unsupported: Collection[str] = ()) -> None:
        """Refuses the fields that nothing has read, by name; `unsupported` ones exist elsewhere."""
        for name in self._left:
            full = self.name(name)
            if name in unsupported:
                raise Refused(
                    f"Unsupported parameter: '{full}' is not supported by this server.",
                    param=full,
                    code="unsupported_parameter",
                )
            shown = full if len(full) <= 80 else f"{full[:77]}..."
            raise Refused(f"Unknown parameter: '{shown}'.", param=shown, code="unknown_parameter")

    def _of(self, name: str, kind: type, wanted: str, default):
        value = self._left.pop(name, default)
        if value is not default and not isinstance(value, kind):
            raise wrong(self.name(name), wanted, value)
        return value

    def _number(self, name: str, kind, wanted: str, least, most, default):
        value = self._left.pop(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            raise wrong(self.name(name), f"{wanted} in [{least}, {most}]", value)
        return value
