"""Messages: a conversation in OpenAI's form becomes what chat templates read."""

from __future__ import annotations

import json

from pyspec.arguments import described
from pyspec.serving.fields import Fields, wrong
from pyspec.serving.refusals import Refused

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def read_messages(fields: Fields) -> list[dict]:
    """The messages of a request; raises Refused where one does not fit, or holds more than text."""
    messages = fields.array("messages")
    if not messages:
        raise Refused("'messages' must be an array that is not empty", param="messages")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message, path: str) -> dict:
    if not isinstance(message, dict):
        raise wrong(path, "an object", message)
    fields = Fields(message, path + ".")
    role = fields.one_of("role", tuple(_ROLES))
    read = {"role": _ROLES[role], "content": _content(fields, path + ".content")}
    calls = fields.array("tool_calls") if role == "assistant" else None
    if calls:
        read["tool_calls"] = [_call(call, f"{path}.tool_calls[{place}]") for place, call in enumerate(calls)]
    elif read["content"] is None:
        raise Refused(f"'{path}.content' must be a string or an array of texts", param=f"{path}.content")
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := fields.text(name)) is not None:
            read[name] = value
    fields.finish(("audio", "function_call", "refusal", "annotations"))
    return read


def _content(fields: Fields, path: str) -> str | None:
    content = fields.any("content")
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(path, "a string or an array of texts", content)
    texts = []
    for place, part in enumerate(content):
        name = f"{path}[{place}]"
        if not isinstance(part, dict):
            raise wrong(name, "an object", part)
        inner = Fields(part, name + ".")
        inner.one_of("type", ("text",))
        texts.append(inner.text("text"))
        inner.finish()
        if texts[-1] is None:
            raise Refused(f"'{name}.text' must be a string", param=f"{name}.text")
    return "".join(texts)


def _call(call, path: str) -> dict:
    """A tool call of an earlier answer, with its arguments opened, as templates want them."""
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        raise wrong(path, "an object with a function", call)
    function = call["function"]
    if not isinstance(function.get("name"), str):
        raise Refused(f"'{path}.function.name' must be a string", param=f"{path}.function.name")
    arguments = function.get("arguments")
    try:
        opened = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        opened = None
    if not isinstance(opened, dict):
        raise wrong(f"{path}.function.arguments", "the JSON text of an object", arguments)
    return {**call, "function": {**function, "arguments": opened}}


def read_tools(fields: Fields) -> list[dict]:
    """The tools that the template is to describe; none where the request wants none called."""
    tools = fields.array("tools") or []
    for place, tool in enumerate(tools):
        is_function = isinstance(tool, dict) and tool.get("type") == "function"
        function = tool.get("function") if is_function else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(
                f"'tools[{place}]' must be a function with a name, got {described(tool)}", param=f"tools[{place}]"
            )
    if "tool_choice" in fields and not tools:
        raise Refused("'tool_choice' must be left out where there are no 'tools'", param="tool_choice")
    choice = fields.one_of("tool_choice", (None, "auto", "none"))
    fields.one_of("parallel_tool_calls", (None, True))
    return [] if choice == "none" else tools
