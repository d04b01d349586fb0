"""Chat templates: a conversation becomes the text that the model was trained on.

A template is a Jinja program that comes with the model. It runs in the sandbox of transformers where that is installed,
so that it sees what it was written for, and in a small one of the same kind otherwise.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names for one thing, of which templates read the first two
_OURS = frozenset(
    {"messages", "conversations", "chat_template", "return_assistant_tokens_mask", "continue_final_message"}
)


def select_template(templates: str | Mapping[str, str] | None, name: str | None, has_tools: bool) -> str:
    """The source of the template to use.

    Args:
        templates: one, or several by their names, or None.
        name: of a template, or the source of another; None chooses "tool_use" where there are tools, else "default".

    Raises:
        ValueError: there is none, or none that would be chosen.
    """
    if not isinstance(templates, Mapping):
        if name is None and templates is None:
            raise ValueError("this model has no chat template: encode the prompt as plain text")
        return templates if name is None else name
    if name is not None:
        return templates.get(name, name)
    chosen = "tool_use" if has_tools and "tool_use" in templates else "default"
    if chosen not in templates:
        raise ValueError(
            f"the model has the chat templates {', '.join(sorted(templates))}: chat_template must name one"
        )
    return templates[chosen]


def render_chat(template: str, messages: Sequence[dict], variables: Mapping[str, Any], source: str) -> str:
    """The text of a conversation.

    Args:
        template: Jinja source.
        messages: dicts with "role" and "content".
        variables: what the template may use beside them: tools, documents, add_generation_prompt, bos_token and others.
        source: where the template comes from, for errors.

    Raises:
        ValueError: it is no template, or fails for these messages in whatever way.
    """
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{index}] must be a dict with role and content, got {type(message).__name__}")
    if taken := sorted(_OURS & variables.keys()):
        raise ValueError(f"a variable of a chat template cannot be named {taken[0]}")
    variables = {"tools": None, "documents": None, **variables}
    for name in ("tools", "documents"):
        _check_dicts(name, variables[name])
    try:
        if not any(map(callable, variables["tools"] or ())):  # importing transformers takes most of a second
            messages = [_normalized(message) for message in messages]
            return _environment().from_string(template).render(messages=messages, **variables)
        from transformers.utils import chat_template_utils

        normalize = getattr(chat_template_utils, "_normalize_chat_messages", list)  # from 5.21 on
        rendered, _ = chat_template_utils.render_jinja_template(
            conversations=[normalize(messages)], chat_template=template, **variables
        )
        return rendered[0]
    except ImportError:
        raise
    except Exception as error:  # a template is a program, so it can fail in any way
        reason = f"{error}" or type(error).__name__
        raise ValueError(f"the chat template of {source} refuses the messages: {reason}") from None


def _check_dicts(name: str, values) -> None:
    """Raises ValueError for what is no list of dicts; a tool may be a function, which transformers describes."""
    if values is None:
        return
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name} must be a list of dicts, got {type(values).__name__}")
    for index, value in enumerate(values):
        if not isinstance(value, Mapping) and not (name == "tools" and callable(value)):
            raise ValueError(f"{name}[{index}] must be a dict, got {type(value).__name__}")


def _normalized(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it to templates: without what is None, and its reasoning under both names."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


@cache
def _environment():
    """An environment like that of transformers, for when transformers is not there."""
    try:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ImportError("chat templates need jinja2: pip install pyspec-kernels[hf]") from None

    class Generation(Extension):
        """{% generation %} marks what an assistant said, for training; its text stays as it is."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # a call block, so that what is set inside stays inside
            return jinja2.nodes.CallBlock(self.call_method("_say"), [], [], body).set_lineno(line)

        def _say(self, caller):
            return caller()

    def raise_exception(reason):
        raise jinja2.TemplateError(reason)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
