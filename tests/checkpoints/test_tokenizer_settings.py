"""Special tokens and chat templates of a folder: what transformers' AutoTokenizer makes of the same files."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pyspec.checkpoints.tokenizer import Tokenizer

WORDS = ["<s>", "</s>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<unk>", "<pad>", "[X]"]
VOCABULARY = {text: token for token, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()) + WORDS)}
TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ x_token }}|{{ image_token }}"
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
CASES = {  # tokenizer_config.json, special_tokens_map.json
    "the map alone": ({}, {"bos_token": "<s>", "eos_token": "</s>"}),
    "the map wins": ({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, {"eos_token": "</s>"}),
    "the map is not read beside added_tokens_decoder": (
        {
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {"258": {"content": "<|im_end|>", "special": True, **FLAGS}},
        },
        {"eos_token": "</s>", "bos_token": "<s>"},
    ),
    "added_tokens_decoder makes tokens": (
        {
            "added_tokens_decoder": {
                "263": {"content": "[X]", "special": False, **FLAGS},
                "256": {"content": "<s>", **FLAGS},
            }
        },
        None,
    ),
    "as entries": (
        {"bos_token": {"__type": "AddedToken", "content": "<s>", **FLAGS}},
        {"eos_token": {"content": "</s>", **FLAGS, "lstrip": True}},
    ),
    "null": ({"bos_token": None, "eos_token": "</s>"}, {}),
    "null in the map": ({"eos_token": "</s>"}, {"eos_token": None}),
    "of the model's own": ({"x_token": "[X]", "image_token": "<img>"}, {}),
    "extra by name": ({"extra_special_tokens": {"image_token": "[X]"}}, {}),
    "extra in a list": ({"extra_special_tokens": ["[X]", "<s>"]}, {}),
    "additional": ({"additional_special_tokens": ["[X]"]}, {"additional_special_tokens": ["<s>", "[X]"]}),
    "extra in the map": ({}, {"extra_special_tokens": ["<s>", "[X]"]}),
    "nothing": ({}, None),
}


def write(folder, config=None, special_map=None):
    backend = Backend(models.BPE(VOCABULARY, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<unk>", special=True, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    for name, entries in (("tokenizer_config", config), ("special_tokens_map", special_map)):
        if entries is not None:
            (folder / f"{name}.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("tokenizer_class", [None, "GPT2Tokenizer", "Qwen2TokenizerFast"])
@pytest.mark.parametrize("name", CASES)
def test_special_tokens_are_those_of_transformers(name, tokenizer_class, tmp_path):
    transformers = pytest.importorskip("transformers")
    config, special_map = CASES[name]
    write(
        tmp_path,
        config | {"chat_template": TEMPLATE, "tokenizer_class": tokenizer_class or "TokenizersBackend"},
        special_map,
    )
    for model_type in ("llama", "qwen2"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ours = Tokenizer.from_folder(tmp_path)
        messages = [{"role": "user", "content": "x"}]
        assert ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False)
        text = "a</s>b <s>[X] <|im_end|>"
        assert ours._encode(text, special=True) == theirs(text, add_special_tokens=False).input_ids
        if theirs.eos_token is not None:
            assert theirs.eos_token_id in ours.eos_tokens


def test_added_tokens_json_is_read_where_nothing_newer_is(tmp_path):
    write(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[Z]": 265, "[Y]": 264, "<s>": 256}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("[Y]a[Z]<s>", special=True) == [264, VOCABULARY["a"], 265, 256]


def test_what_ends_a_text_is_what_the_files_say(tmp_path):
    """<|end|> ends a turn for some models, and for gpt-oss the reasoning alone."""
    write(tmp_path, {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|end|>", "<|im_end|>"]})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_tokens == {VOCABULARY["<|endoftext|>"], VOCABULARY["<|im_end|>"]}
    write(tmp_path, {"eos_token": "<|end|>"})
    assert Tokenizer.from_folder(tmp_path).eos_tokens == {VOCABULARY["<|end|>"]}


# ==== templates ====


def test_templates_come_from_files_before_entries(tmp_path):
    several = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write(tmp_path, {"chat_template": several})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat_template == {"default": "d", "tool_use": "t"}
    assert tokenizer.render([]) == "d" and tokenizer.render([], tools=[]) == "t"
    assert (
        tokenizer.render([], chat_template="tool_use") == "t" and tokenizer.render([], chat_template="{{ 1 }}") == "1"
    )
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("r")
    with pytest.raises(ValueError, match="has the chat templates rag: chat_template must name one"):
        Tokenizer.from_folder(tmp_path).render([])
    (tmp_path / "chat_template.jinja").write_text("f")
    assert Tokenizer.from_folder(tmp_path).chat_template == {"default": "f", "rag": "r"}


def test_variables_reach_the_template(tmp_path):
    names = ("bos_token", "tools", "documents", "enable_thinking", "reasoning_effort", "add_generation_prompt")
    template = "".join(f"{{{{ {name} }}}}" for name in names)
    write(tmp_path, {"chat_template": template, "bos_token": "<s>"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.render([]) == "<s>NoneNoneTrue"
    options = {
        "enable_thinking": False,
        "reasoning_effort": "low",
        "add_generation_prompt": False,
        "bos_token": "<unk>",
    }
    text = "<unk>[{'a': 1}][{'title': 't'}]FalselowFalse"
    assert tokenizer.render([], tools=[{"a": 1}], documents=[{"title": "t"}], **options) == text
    tokens = tokenizer.chat([], tools=[{"a": 1}], documents=[{"title": "t"}], **options)
    assert tokens == tokenizer.encode(text, special=True) and tokens[0] == VOCABULARY["<unk>"]


def test_a_failure_names_the_file_of_the_template(tmp_path):
    write(tmp_path, {"chat_template": "{{ 1 // 0 }}"})
    for file, reason in (("tokenizer_config.json", "division"), ("chat_template.jinja", "unexpected")):
        with pytest.raises(ValueError, match=f"the chat template of .*{file} refuses the messages: .*{reason}"):
            Tokenizer.from_folder(tmp_path).chat([])
        (tmp_path / "chat_template.jinja").write_text("{{")


# ==== whatever the files say ====

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 3),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 2), max_size=2),
    st.sampled_from(
        [
            {},
            {"content": 1},
            {"content": "<s>", "lstrip": 3},
            {"content": "a"},
            [{}],
            [{"name": "x"}],
            ["a"],
            {"1": {"content": "x"}},
            {"x": "<s>"},
            {"default": 3},
            [{"name": "default", "template": "x"}],
        ]
    ),
)
NAMES = [
    "bos_token",
    "eos_token",
    "x_token",
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "chat_template",
    "tokenizer_class",
]


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    st.sampled_from(["tokenizer_config.json", "special_tokens_map.json"]), st.dictionaries(st.sampled_from(NAMES), ODD)
)
def test_any_entry_is_read_or_named(file, entries):
    (FOLDER / file).write_text(json.dumps(entries))
    try:
        Tokenizer.from_folder(FOLDER).encode("abc")
    except ValueError as error:
        assert file in str(error) and any(name in str(error) for name in entries), error
    finally:
        (FOLDER / file).unlink()


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("tokenizer")
    write(FOLDER)


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"]
)
@pytest.mark.parametrize("text", ["{", "[]", "3", '{"a": "b"}'])
def test_files_that_are_none_are_named(file, text, tmp_path):
    write(tmp_path)
    (tmp_path / file).write_text(text)
    if file != "added_tokens.json" and text.startswith('{"'):
        Tokenizer.from_folder(tmp_path)
        return
    with pytest.raises(ValueError, match=file):
        Tokenizer.from_folder(tmp_path)
