"""Every field of OpenAI's interface is honoured, or refused by its name."""

from types import SimpleNamespace

import pytest

from pyspec.serving.fields import parse_body
from pyspec.serving.refusals import Refused
from pyspec.serving.requests import read_chat, read_completion
from tests.helpers.talking_llama import Letters

ENGINE = SimpleNamespace(
    slots=4, context_length=200, model=SimpleNamespace(tokenizer=Letters(), vocab_size=97, eos_tokens={96})
)
SAY = [{"role": "user", "content": "hello"}]


def chat(**fields):
    return read_chat({"model": "m", "messages": SAY} | fields, ENGINE, "m")


def complete(**fields):
    return read_completion({"model": "m", "prompt": "hello"} | fields, ENGINE, "m")


def text_of(prompt):
    return "".join(Letters().token_bytes(token).decode() for token in prompt)


# what of a request is seen where
HONOURED = {
    "temperature": (0.5, lambda ask: ask.settings["temperature"] == 0.5),
    "top_p": (0.25, lambda ask: ask.settings["top_p"] == 0.25),
    "top_k": (7, lambda ask: ask.settings["top_k"] == 7),
    "min_p": (0.1, lambda ask: ask.settings["min_p"] == 0.1),
    "seed": (-1, lambda ask: ask.seeds == [2**64 - 1]),
    "n": (3, lambda ask: len(ask.prompts) == 3 and len(set(ask.seeds)) == 3),
    "stop": (["a", "b"], lambda ask: ask.settings["stop"] == ("a", "b")),
    "frequency_penalty": (-2, lambda ask: ask.settings["frequency_penalty"] == -2),
    "presence_penalty": (1.5, lambda ask: ask.settings["presence_penalty"] == 1.5),
    "logit_bias": ({"5": -100}, lambda ask: ask.settings["logit_bias"] == {"5": -100}),
    "stream": (True, lambda ask: ask.stream),
    "max_tokens": (9, lambda ask: ask.settings["max_new_tokens"] == 9),
    "user": ("me", lambda ask: True),
    "metadata": ({"a": "b"}, lambda ask: True),
}
HONOURED_IN_CHATS = {
    "max_completion_tokens": (9, lambda ask: ask.settings["max_new_tokens"] == 9),
    "logprobs": (True, lambda ask: ask.settings["logprobs"] == ask.top_logprobs == 0),
    "response_format": (
        {"type": "json_object"},
        lambda ask: ask.settings["grammar"] == {"json_schema": {"type": "object"}},
    ),
    "tools": (
        [{"type": "function", "function": {"name": "look"}}],
        lambda ask: text_of(ask.prompts[0]).startswith("tool look\n"),
    ),
    "reasoning_effort": ("low", lambda ask: text_of(ask.prompts[0]).startswith("reasoning_effort=low\n")),
    "chat_template_kwargs": ({"deep": False}, lambda ask: text_of(ask.prompts[0]).startswith("deep=False\n")),
    "parallel_tool_calls": (True, lambda ask: True),
    "modalities": (["text"], lambda ask: True),
    "store": (False, lambda ask: True),
    "service_tier": ("auto", lambda ask: True),
}
HONOURED_IN_COMPLETIONS = {
    "logprobs": (3, lambda ask: ask.settings["logprobs"] == ask.top_logprobs == 3),
    "prompt": (["ab", "c"], lambda ask: list(map(text_of, ask.prompts)) == ["ab", "c"]),
    "echo": (False, lambda ask: True),
    "best_of": (1, lambda ask: True),
}


def cases():
    for read, own in ((chat, HONOURED_IN_CHATS), (complete, HONOURED_IN_COMPLETIONS)):
        for name, (value, seen) in (HONOURED | own).items():
            yield pytest.param(read, name, value, seen, id=f"{read.__name__}-{name}")


@pytest.mark.parametrize("read, name, value, seen", list(cases()))
def test_a_field_is_honoured(read, name, value, seen):
    assert seen(read(**{name: value}))
    assert name == "prompt" or read(**{name: None}).settings.keys() == read().settings.keys()  # null is as good as none


WRONG = [
    (chat, {"temperature": 2.1}, "temperature"),
    (chat, {"temperature": True}, "temperature"),
    (chat, {"top_p": "1"}, "top_p"),
    (chat, {"n": 5}, "n"),
    (chat, {"n": 0}, "n"),
    (chat, {"n": 1.0}, "n"),
    (chat, {"seed": 1.5}, "seed"),
    (chat, {"stop": ["a"] * 17}, "stop"),
    (chat, {"stop": ""}, "stop"),
    (chat, {"stop": [1]}, "stop"),
    (chat, {"max_tokens": 0}, "max_tokens"),
    (chat, {"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens"),
    (chat, {"top_logprobs": 3}, "top_logprobs"),
    (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (chat, {"logprobs": 1}, "logprobs"),
    (chat, {"frequency_penalty": 3}, "frequency_penalty"),
    (chat, {"logit_bias": {"3": 101}}, "logit_bias.3"),
    (chat, {"logit_bias": []}, "logit_bias"),
    (chat, {"stream": "yes"}, "stream"),
    (chat, {"stream_options": {"include_usage": True}}, "stream_options"),
    (chat, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    (chat, {"stream": True, "stream_options": {"no": 1}}, "stream_options.no"),
    (chat, {"response_format": {"type": "xml"}}, "response_format.type"),
    (chat, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (chat, {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "schema"),
    (chat, {"tools": [{"type": "web"}]}, "tools[0]"),
    (chat, {"tool_choice": "auto"}, "tool_choice"),
    (chat, {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, "tool_choice"),
    (chat, {"parallel_tool_calls": False}, "parallel_tool_calls"),
    (chat, {"modalities": ["audio"]}, "modalities"),
    (chat, {"store": True}, "store"),
    (chat, {"functions": []}, "functions"),
    (chat, {"prediction": {}}, "prediction"),
    (chat, {"suffix": "x"}, "suffix"),
    (chat, {"surprise": 1}, "surprise"),
    (chat, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template"),
    (chat, {"chat_template_kwargs": {"refuse": True}}, "messages"),
    (chat, {"messages": []}, "messages"),
    (chat, {"messages": "hello"}, "messages"),
    (chat, {"messages": ["hello"]}, "messages[0]"),
    (chat, {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    (chat, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (chat, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    (chat, {"messages": [{"role": "user", "content": "x", "colour": 3}]}, "messages[0].colour"),
    (chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    (chat, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    (chat, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]"),
    (chat, {"messages": [{"role": "user", "content": "x" * 200}]}, "messages"),
    (complete, {"prompt": None}, "prompt"),
    (complete, {"prompt": ""}, "prompt"),
    (complete, {"prompt": []}, "prompt"),
    (complete, {"prompt": [1, "a"]}, "prompt"),
    (complete, {"prompt": [97]}, "prompt"),
    (complete, {"prompt": [True]}, "prompt"),
    (complete, {"prompt": ["a"] * 5}, "prompt"),
    (complete, {"prompt": ["a", "b"], "n": 3}, "n"),
    (complete, {"logprobs": True}, "logprobs"),
    (complete, {"echo": True}, "echo"),
    (complete, {"best_of": 2}, "best_of"),
    (complete, {"suffix": "x"}, "suffix"),
    (complete, {"messages": SAY}, "messages"),
]


@pytest.mark.parametrize("read, fields, name", WRONG, ids=lambda value: getattr(value, "__name__", str(value))[:40])
def test_what_cannot_be_honoured_is_refused_by_its_name(read, fields, name):
    with pytest.raises(Refused) as caught:
        read(**fields)
    error = caught.value.to_dict()["error"]
    assert caught.value.status == 400 and error["type"] == "invalid_request_error"
    assert error["param"].endswith(name) and name in error["message"] or name == "messages"


def test_a_model_that_is_not_served_is_not_found():
    for model, status in ((None, 400), (3, 400), ("other", 404)):
        with pytest.raises(Refused) as caught:
            chat(model=model)
        assert caught.value.status == status and caught.value.param == "model"


def test_messages_become_what_templates_read():
    seen = []
    engine = SimpleNamespace(**vars(ENGINE))
    engine.model = SimpleNamespace(**vars(ENGINE.model))
    engine.model.tokenizer = Letters()
    engine.model.tokenizer.chat = lambda messages, **options: seen.append((messages, options)) or [1]
    function = {"name": "look", "arguments": '{"at": "sky"}'}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "content": "blue", "tool_call_id": "1"},
    ]
    tools = [{"type": "function", "function": {"name": "look"}}]
    read_chat({"model": "m", "messages": messages, "tools": tools, "tool_choice": "none"}, engine, "m")
    ((read, options),) = seen
    assert read[0] == {"role": "system", "content": "be brief"} and options == {}
    assert read[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": "sky"}}
    assert read[2] == {"role": "tool", "content": "blue", "tool_call_id": "1"}


BAD_BODIES = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": "\\ud800"}', b"3"]
BAD_BODIES += [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, '{"a": "é"}'.encode("latin-1")]


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: str(body[:20]))
def test_a_body_that_is_no_json_object_is_refused(body):
    with pytest.raises(Refused, match="the body"):
        parse_body(body)
