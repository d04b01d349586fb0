"""Chat templates: our sandbox makes the text of one that transformers makes, or both refuse it."""

import sys

import pytest

from pyspec.checkpoints.chat_templates import render_chat, select_template

USER = [{"role": "user", "content": "Hi ü\"'<b>"}]
TURNS = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2", "reasoning_content": "add"},
    {"role": "user", "content": "And 2 + 2?"},
]
TOOLS = [
    {"type": "function", "function": {"name": "wetter", "description": 'für "dich"', "parameters": {"b": 1, "a": [2]}}}
]
CALLS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "abcdefghi",
                "type": "function",
                "function": {"name": "wetter", "arguments": {"ort": "Köln", "n": 1}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "wetter", "content": "18 °C"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}]
CONVERSATIONS = {"user": USER, "turns": TURNS, "calls": CALLS, "parts": PARTS, "nothing": []}

# constructs of published templates, in words of our own: each is what some family's template hangs on
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "bos and trim (Llama 3)": (
        "{{- bos_token }}\n{%- for m in messages %}\n{{- '<|h|>' + m['role'] + '<|/h|>\n\n' + m['content'] | trim"
        " + '<|eot_id|>' }}\n{%- endfor %}"
    ),
    "system out of the list (Llama 2, Gemma)": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system = false %}{% endif %}{% for m in loop_messages %}"
        "{% if loop.index0 == 0 and system != false %}<<SYS>>{{ system }}<</SYS>>{% endif %}{{ m.content }}"
        "{% endfor %}"
    ),
    "roles must alternate (Mistral)": (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "[INST] {{ m['content'] }} [/INST]{% endfor %}"
    ),
    "tools is not none (Mistral Nemo)": (
        "{% if tools is not none %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "{{ messages | length }}"
    ),
    "tools is defined (Hermes)": (
        "{% if tools is defined and tools %}yes{% else %}no{% endif %}{% if not tools is defined %}"
        "{% set tools = none %}{% endif %}{{ tools }}"
    ),
    "tools by default": ("{% if tools | default(none) is none %}none{% else %}{{ tools[0].function.name }}{% endif %}"),
    "iterating over None (Command-R)": "{% for tool in tools %}{{ tool['function']['name'] }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ tools | tojson }}",
    "tojson(ensure_ascii=False) (GigaChat)": "{{ messages | tojson(ensure_ascii=False) }}",
    "tojson(ensure_ascii=True)": "{{ messages | tojson(ensure_ascii=true) }}",
    "tojson(indent) (Llama 3)": "{{ tools | tojson(indent=4) }}",
    "tojson(separators, sort_keys)": (
        "{{ tools | tojson(separators=(',', ':'), sort_keys=True) }}{{ tools | tojson(False, 2) }}"
    ),
    "tojson(unknown)": "{{ tools | tojson(sorted=True) }}",
    "generation (LFM2, Laguna)": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "generation with minus signs": (
        "{%- for m in messages -%}  {%- generation -%}  {{- m.role }}  {%- endgeneration %}\n x {% endfor -%}"
    ),
    "generation keeps what is set inside": (
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    ),
    "break (Cohere)": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.role }}{% endfor %}"
    ),
    "continue (DeepSeek)": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}"
    ),
    "namespace (Qwen)": (
        "{% set ns = namespace(last=-1, multi=true) %}{% for m in messages[::-1] %}"
        "{% set index = (messages | length - 1) - loop.index0 %}{% if ns.multi and m.role == 'user' %}"
        "{% set ns.multi = false %}{% set ns.last = index %}{% endif %}{% endfor %}{{ ns.last }}"
    ),
    "splitting reasoning off (Qwen3)": (
        "{% for m in messages %}{% set content = m.content %}{% if '</think>' in content %}"
        "{{ content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') }}"
        "|{{ content.split('</think>')[-1].lstrip('\n') }}{% endif %}{% endfor %}"
    ),
    "enable_thinking (Qwen3)": (
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}x"
    ),
    "reasoning_effort (gpt-oss)": (
        "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}"
        "Reasoning: {{ reasoning_effort }}"
    ),
    "thinking (gpt-oss)": "{% for m in messages %}{{ m.thinking }}/{{ m.reasoning_content }};{% endfor %}",
    "macros (gpt-oss, Gemma 4)": (
        "{%- macro render(spec, deep=false) -%}{{ spec.name }}{% if deep %}{{ spec.parameters | tojson }}"
        "{% endif %}{%- endmacro -%}{% for tool in tools or [] %}{{ render(tool.function, deep=true) }}"
        "{% endfor %}"
    ),
    "strings by type": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
        "{% elif m.content is iterable and m.content is not mapping %}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}{% endif %}"
        "{% endfor %}"
    ),
    "concatenating what is no string (SmolLM2)": ("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"),
    "arguments (Qwen2.5)": (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}"
        "{% set call = call.function if call.function is defined else call %}{{ call.name }}"
        "{{ call.arguments | tojson }}{% for k, v in call.arguments.items() %}{{ k ~ '=' ~ v }}{% endfor %}"
        "{% endfor %}{% endfor %}"
    ),
    "attributes that are missing": (
        "{% for m in messages %}{{ m.name }}{{ m['tool_call_id'] }}{{ m.get('x', 'y') }}{% endfor %}"
    ),
    "an attribute of what is missing": "{{ messages[0].function.name }}",
    "selectattr and map (Phi-4)": (
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | join(',') }}"
        "{{ messages | rejectattr('role', 'in', ['user']) | list | length }}"
    ),
    "sorting (Granite)": (
        "{% for k, v in messages[0] | dictsort %}{{ k }}{% endfor %}{{ (messages | groupby('role') | list) | length }}"
    ),
    "documents (Granite, Command-R)": (
        "{% if documents is not none and documents %}{% for d in documents %}{{ loop.index }}"
        ": {{ d.title | upper }} {{ d['text'] }}\n{% endfor %}{% endif %}."
    ),
    "strftime_now (Llama 3.2)": (
        "{% if strftime_now is defined %}{{ strftime_now('%Y') | length }}{% else %}26 Jul 2024{% endif %}"
    ),
    "date_string by default": (
        "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{{ date_string }}"
    ),
    "raise_exception": "{{ raise_exception('only user and assistant roles') }}",
    "an unknown tag": "{% audience %}",
    "an unknown filter": "{{ messages | fancy }}",
    "a syntax error": "{% if",
    "division by zero": "{{ 1 // 0 }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "the sandbox": "{{ messages.__class__.__mro__ }}",
    "changing the messages": "{% set _ = messages.append(1) %}",
    "block trimming": "  {% if true %}\n  a\n  {% endif %}\nb {#- c -#} d\n{{ 'e' }}\n",
    "slices and ranges": (
        "{{ range(3) | list }}{{ 'abcdef'[1:-1:2] }}{{ messages[-1:] | length }}{{ [1] + [2] }}{{ 'a' * 3 }}"
    ),
    "conditional expressions": (
        "{{ 'a' if messages else 'b' }}{{ 'x' if false }}{{ none or 'n' }}{{ 1 <= messages | length <= 3 }}"
    ),
    "string methods": (
        "{{ ' a b '.strip().upper().replace(' ', '_').startswith('A') }}{{ 'a\\nb'.splitlines() }}"
        "{{ '%s-%d' | format('a', 2) }}"
    ),
    "loop variables": (
        "{% for m in messages %}{{ loop.first }}{{ loop.last }}{{ loop.previtem.role if loop.previtem }}"
        "{{ loop.length }}{% else %}nobody{% endfor %}"
    ),
    "call and filter blocks": (
        "{% filter upper %}a{{ bos_token }}{% endfilter %}{% set x %}b{% endset %}{{ x | trim }}{% raw %}"
        "{{ }}{% endraw %}"
    ),
    "dict()": "{% set d = dict(a=1) %}{{ d.a }}{{ dict(messages[0]).role if messages else '' }}",
    "number formats": "{{ 1.50 }}{{ 1e3 | int }}{{ '3' | int + 1 }}{{ 10 | string | length }}{{ 3 is odd }}",
    "escapes": "{{ '<&>' | e }}{{ '<&>' | safe }}{{ messages[0].content if messages }}",
}
VARIABLES = [
    {},
    {"tools": TOOLS, "enable_thinking": False, "reasoning_effort": "high"},
    {"documents": [{"title": "t", "text": "ß"}], "add_generation_prompt": False},
]
assert len(TEMPLATES) > 30


def hide_transformers(monkeypatch):
    """From here on transformers cannot be imported."""
    for name in ("transformers", "transformers.utils"):
        monkeypatch.setitem(sys.modules, name, None)


def outcome(template, messages, variables):
    variables = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"} | variables
    try:
        return render_chat(template, messages, variables, "FILE")
    except ValueError as error:
        assert str(error).startswith("the chat template of FILE refuses the messages: ") and len(str(error)) > 50
        return ValueError


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_apply_chat_template(name):
    transformers = pytest.importorskip("transformers")
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    for messages in CONVERSATIONS.values():
        for variables in VARIABLES if messages else ():  # transformers has nothing to say of no messages
            options = {"add_generation_prompt": True} | variables
            try:
                expected = tokenizer.apply_chat_template(
                    messages, chat_template=TEMPLATES[name], tokenize=False, **options
                )
            except Exception:  # whatever its kind, ours is a ValueError
                expected = ValueError
            assert outcome(TEMPLATES[name], messages, variables) == expected


def test_nothing_of_this_is_vacuous():
    """Of the templates above most give a text, and those that shall be refused are."""
    outcomes = {
        name: [outcome(template, messages, {}) for messages in CONVERSATIONS.values()]
        for name, template in TEMPLATES.items()
    }
    refused = {name for name, found in outcomes.items() if set(found) == {ValueError}}
    assert refused == {
        "raise_exception",
        "an unknown tag",
        "an unknown filter",
        "a syntax error",
        "division by zero",
        "recursion",
        "the sandbox",
        "changing the messages",
        "tojson(unknown)",
        "an attribute of what is missing",
        "iterating over None (Command-R)",
    }
    assert outcomes["generation (LFM2, Laguna)"][1].count("<|im_end|>\n") == 1
    assert outcomes["tojson(ensure_ascii=False) (GigaChat)"][0] == '[{"role": "user", "content": "Hi ü\\"\'<b>"}]'


def test_without_transformers_jinja_is_enough(monkeypatch):
    hide_transformers(monkeypatch)
    assert outcome("{% generation %}{{ tools is none }}{{ documents }}{% endgeneration %}", USER, {}) == "TrueNone"
    message = {"role": "assistant", "content": None, "reasoning": "so"}
    assert outcome("{{ messages[0] | tojson }}", [message], {}) == (
        '{"thinking": "so", "role": "assistant", "reasoning": "so", "reasoning_content": "so"}'
    )


def test_what_is_no_conversation_is_named():
    with pytest.raises(ValueError, match=r"messages\[1\] must be a dict with role and content, got str"):
        render_chat("", [USER[0], "hi"], {}, "FILE")
    with pytest.raises(ValueError, match="a variable of a chat template cannot be named conversations"):
        render_chat("", USER, {"conversations": []}, "FILE")
    for variables, message in (
        ({"tools": TOOLS[0]}, "tools must be a list of dicts, got dict"),
        ({"tools": "wetter"}, "tools must be a list of dicts, got str"),
        ({"tools": [*TOOLS, "wetter"]}, r"tools\[1\] must be a dict, got str"),
        ({"documents": ["a text"]}, r"documents\[0\] must be a dict, got str"),
        ({"documents": [print]}, r"documents\[0\] must be a dict, got builtin_function_or_method"),
    ):
        with pytest.raises(ValueError, match=message):
            render_chat("{{ tools }}{{ documents }}", USER, variables, "FILE")


def test_a_tool_may_be_a_function():
    pytest.importorskip("transformers")

    def wetter(ort: str) -> str:
        """Says how the weather is.

        Args:
            ort: where.
        """

    text = render_chat("{{ tools[0] | tojson }}", USER, {"tools": [wetter]}, "FILE")
    assert '"name": "wetter"' in text and '"where."' in text


def test_templates_are_chosen_by_their_names():
    several = {"default": "d", "tool_use": "t", "rag": "r"}
    assert select_template("x", None, False) == select_template("x", None, True) == "x"
    assert select_template(several, None, False) == "d" and select_template(several, None, True) == "t"
    assert select_template(several, "rag", True) == "r" and select_template(several, "{{ 1 }}", True) == "{{ 1 }}"
    with pytest.raises(ValueError, match="has the chat templates rag: chat_template must name one"):
        select_template({"rag": "r"}, None, True)
    with pytest.raises(ValueError, match="no chat template"):
        select_template(None, None, False)
