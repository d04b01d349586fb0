import inspect
import json
import random
from pathlib import Path

import gguf
import pytest

from pyspec.checkpoints.gguf import GGUFFile
from pyspec.checkpoints.pre_tokenizers import OVER_CHARACTERS
from pyspec.checkpoints.tokenizer import _SPLITS, Tokenizer

TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog, doesn't it? They'LL say we've 12345 or 67 reasons.\n\n  Well...",
    "def f(x):\n    return x ** 2  # naïve façade — “quoted” 東京 こんにちは привет мир 🎉🎉 ½ ٣٤٥",
    "  leading, trailing  \t tabs\r\nand lines\n",
] * 30 + inspect.getsource(random).splitlines(keepends=True)  # enough for merges that compete
TEXTS = [
    *TRAINING_TEXT[:3],
    *TRAINING_TEXT[100:300],
    "",
    " ",
    "   a",
    "\n\n\t x",
    "日本語のテスト 🎉👩‍👩‍👧 ñ ﬁ İstanbul",
    "١٢٣ 1234567 ½ Ⅷ",
    "don't WE'LL I'm 'Re",
    "\u200b\u00a0\u3000x e\u0301",
    "a\r\nb\r\n\r\n  c",
    "\x01\x02 <|im_end|> </s> <s>[INST]",
    "----====____ $5+<=>^~|",
]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "{{ '<s>' + message['role'] + ': ' + message['content'] + '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def random_texts(count):
    generator = random.Random(0)
    ranges = [(32, 127), (0xA0, 0x2FF), (0x370, 0x5FF), (0x4E00, 0x4EFF), (0x1F300, 0x1F5FF), (32, 33), (48, 58)]
    return [
        "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(generator.randrange(1, 60)))
        for _ in range(count)
    ]


def train(kind):
    """A small vocabulary: (texts of tokens, merges)."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    if kind == "bytes":
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special, alphabet = ["<s>", "</s>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(
            *(("▁", "merged_with_next") if kind == "pieces" else ("\n", "isolated"))
        )
        special, alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))], []
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False, limit_alphabet=330
    )
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    model = json.loads(backend.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def write_vocabulary(path, kind, pre="default", **metadata):
    texts, merges = train(kind)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    if kind == "characters":
        texts = texts + ["\n" * count for count in range(2, 9)]  # tokens that no merges lead to
    writer.add_token_list(texts)
    writer.add_tokenizer_pre(pre)
    if kind == "bytes":
        writer.add_tokenizer_model("gpt2")
        writer.add_token_types([3, 3, 3] + [1] * (len(texts) - 3))
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    elif kind == "characters":
        writer.add_tokenizer_model("gemma4")
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(texts) - 259))
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    else:
        writer.add_tokenizer_model("llama")
        rank = {}
        for index, merge in enumerate(merges):
            rank.setdefault("".join(merge), index)
        writer.add_token_scores([0.0 if i < 259 else -float(rank.get(t, 10000 + i)) for i, t in enumerate(texts)])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(texts) - 259))
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    for key, value in metadata.items():
        writer.add_key_value(f"tokenizer.{key}", value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_vocabulary(path):
    return Tokenizer.from_gguf(GGUFFile(path).metadata, path)


# one name for each list of patterns
PATTERNS = {tuple(patterns): name for name, patterns in reversed(_SPLITS.items()) if name not in OVER_CHARACTERS}


@pytest.fixture(
    scope="module",
    params=[*(("bytes", pre) for pre in PATTERNS.values()), ("pieces", "default"), ("characters", "gemma4")],
    ids="-".join,
)
def vocabulary(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    write_vocabulary(path, *request.param)
    return path, read_vocabulary(path)


def test_tokens_are_those_of_llama_cpp(vocabulary):
    llama_cpp = pytest.importorskip("llama_cpp")
    path, tokenizer = vocabulary
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in TEXTS + random_texts(200):
        for special in (False, True):
            expected = model.tokenize(text.encode(), add_bos=False, special=special)
            assert tokenizer._encode(text, special) == expected, text
    assert (tokenizer._bos is not None) == model._model.add_bos_token()


def test_bytes_of_tokens_make_up_the_text(vocabulary):
    _, tokenizer = vocabulary
    for text in TEXTS + random_texts(50):
        joined = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
        # SentencePiece puts a space before the first word
        assert joined.decode() in (text, " " + text)
        assert tokenizer.decode(tokenizer.encode(text)) == joined.decode()
    assert tokenizer.token_bytes(-1) == tokenizer.token_bytes(10**6) == b""


def test_an_unfinished_character_is_a_replacement_character(vocabulary):
    _, tokenizer = vocabulary
    tokens = tokenizer.encode("𐍈")  # not in the training text: one token for each byte
    assert len(tokens) >= 4
    assert tokenizer.decode(tokens[:-1]).endswith("�")
    assert tokenizer.decode(tokens).endswith("𐍈")


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "in 2024 it's", ["in", " ", "2", "0", "2", "4", " it", "'s"]),
        ("gpt-2", "in 2024 it's", ["in", " 2024", " it", "'s"]),
        ("llama-bpe", "in 2024 IT'S\n\n x", ["in", " ", "202", "4", " IT", "'S", "\n\n", " x"]),
        ("qwen2", "in 2024 IT'S", ["in", " ", "2", "0", "2", "4", " IT", "'S"]),
        ("default", "in 2024, ok", ["in", " ", "202", "4", ",", " ok"]),
    ],
)
def test_words_are_split_by_the_models_rules(pre, text, words, tmp_path):
    write_vocabulary(tmp_path / "v.gguf", "bytes", pre)
    backend = read_vocabulary(tmp_path / "v.gguf").backend
    split = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert split == words


def test_special_tokens_are_text_unless_asked_for(tmp_path):
    write_vocabulary(tmp_path / "v.gguf", "bytes", "smollm")
    tokenizer = read_vocabulary(tmp_path / "v.gguf")
    assert tokenizer.encode("a<|im_end|>", special=True)[-1] == 2
    plain = tokenizer.encode("a<|im_end|>")
    assert 2 not in plain and tokenizer.decode(plain) == "a<|im_end|>"
    assert tokenizer.decode([2]) == "" and tokenizer.token_bytes(2) == b""
    assert tokenizer.eos_tokens == {1, 2}  # the one that the metadata names, and the usual end of a turn


@pytest.mark.parametrize(
    ("texts", "ends"),
    [
        ("<|im_end|> <|endoftext|> <|im_start|>", "<|im_end|> <|endoftext|>"),  # Qwen
        ("<|end|> <|endoftext|> <|user|>", "<|end|> <|endoftext|>"),  # Phi-3
        ("<|end_of_text|> <|eot_id|> <|eom_id|> <|begin_of_text|>", "<|end_of_text|> <|eot_id|> <|eom_id|>"),  # Llama 3
        ("<eos> <start_of_turn> <end_of_turn>", "<eos> <end_of_turn>"),  # Gemma
        ("<eos> <|turn> <turn|> </s> <|tool_response>", "<eos> <turn|> <|tool_response>"),  # Gemma 4
        ("<|start|> <|end|> <|message|> <|return|> <|call|> <|endoftext|>", "<|return|> <|call|> <|endoftext|>"),
        ("<|im_end|> <|end|> <|calls|> <|flush|>", "<|im_end|> <|calls|> <|flush|>"),  # Solar Open
        ("[EOS] [EOT] <|im_end|> <|im_middle|>", "[EOS] [EOT] <|im_end|>"),  # Kimi K2
    ],
)
def test_names_that_end_a_text(texts, ends):
    """Whether <|end|> is one depends on what else there is: gpt-oss ends its reasoning with it."""
    texts = texts.split()
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": texts}
    metadata |= {"tokenizer.ggml.token_type": [3] * len(texts), "tokenizer.ggml.merges": []}
    found = Tokenizer.from_gguf(metadata, Path("F")).eos_tokens
    assert {texts[token] for token in found} == set(ends.split())
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.add_special_tokens(texts)
    folder = Tokenizer(backend, byte_level=True, chat_template="".join(texts))
    assert {texts[token] for token in folder.eos_tokens} == set(ends.split())


@pytest.mark.parametrize("texts", ["<|start|> <|end|> <|message|> <|channel|>", "<|start|> <|message|> <|end|>"])
def test_names_that_head_channels(texts):
    import tokenizers

    backend, texts = tokenizers.Tokenizer(tokenizers.models.BPE()), texts.split()
    backend.add_special_tokens(texts)
    expected = {} if "<|channel|>" not in texts else {0: "<|start|>", 2: "<|message|>", 3: "<|channel|>"}
    assert Tokenizer(backend, byte_level=True).channel_marks == expected


@pytest.mark.parametrize(
    ("kind", "pre", "wants"),
    [
        ("bytes", "smollm", False),
        ("bytes", "llama-bpe", True),
        ("pieces", "default", True),
        ("characters", "gemma4", True),
    ],
)
def test_the_token_for_the_beginning_comes_first_where_the_model_wants_it(kind, pre, wants, tmp_path):
    bos = 0 if kind == "bytes" else 1
    write_vocabulary(tmp_path / "v.gguf", kind, pre)
    tokenizer = read_vocabulary(tmp_path / "v.gguf")
    assert (tokenizer.encode("fox")[0] == bos) == wants
    assert tokenizer.encode("<s>fox", special=True).count(bos) == 1
    write_vocabulary(tmp_path / "w.gguf", kind, pre, **{"ggml.add_bos_token": not wants})
    # of Gemma 4 the first files say that it does not, and are wrong
    assert (read_vocabulary(tmp_path / "w.gguf").encode("fox")[0] == bos) == (kind == "characters" or not wants)


def test_chat_renders_the_models_template(tmp_path):
    write_vocabulary(tmp_path / "v.gguf", "bytes", "smollm", chat_template=TEMPLATE)
    tokenizer = read_vocabulary(tmp_path / "v.gguf")
    tokens = tokenizer.chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": "fox?"}])
    text = "<s>system: be brief<|im_end|>\n<s>user: fox?<|im_end|>\nassistant: "
    assert tokens == tokenizer.encode(text, special=True)
    assert tokens.count(0) == tokens.count(2) == 2
    with pytest.raises(ValueError, match="refuses the messages: system must come first"):
        tokenizer.chat([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])
    tokenizer.chat_template = "{% if"
    with pytest.raises(ValueError, match="chat template"):
        tokenizer.chat([])
    tokenizer.chat_template = "{{ messages.__class__.__mro__ }}"  # a template is someone else's program
    with pytest.raises(ValueError, match="unsafe"):
        tokenizer.chat([])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat([])


def test_a_folder_gives_the_same_tokenizer(vocabulary, tmp_path):
    _, tokenizer = vocabulary
    assert Tokenizer.from_folder(tmp_path) is None
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "chat_template": [{"name": "default", "template": "x"}]})
    )
    same = Tokenizer.from_folder(tmp_path)
    assert same.fingerprint == tokenizer.fingerprint
    assert same.eos_tokens == tokenizer.eos_tokens
    assert same.chat_template == "x"
    for text in TEXTS:
        assert same._encode(text, special=True) == tokenizer._encode(text, special=True)
        assert [*map(same.token_bytes, same._encode(text, False))] == [
            *map(tokenizer.token_bytes, tokenizer._encode(text, False))
        ]
    (tmp_path / "chat_template.jinja").write_text("y")
    assert Tokenizer.from_folder(tmp_path).chat_template == "y"
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is corrupt"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_puts_the_token_for_the_beginning_first_where_its_post_processor_does(tmp_path):
    from tokenizers import processors

    write_vocabulary(tmp_path / "v.gguf", "bytes", "qwen2")
    backend = read_vocabulary(tmp_path / "v.gguf").backend
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode("fox")[0] == 0


def test_fingerprints_tell_vocabularies_apart(tmp_path):
    write_vocabulary(tmp_path / "v.gguf", "bytes", "qwen2")
    write_vocabulary(tmp_path / "w.gguf", "pieces")
    v, w = (read_vocabulary(tmp_path / name) for name in ("v.gguf", "w.gguf"))
    assert v.fingerprint != w.fingerprint
    assert v.fingerprint == read_vocabulary(tmp_path / "v.gguf").fingerprint


def test_unknown_kinds_are_refused(tmp_path):
    write_vocabulary(tmp_path / "v.gguf", "bytes", "unheard-of")
    with pytest.raises(ValueError, match="rules 'unheard-of', supported are .*deepseek-r1-qwen.*, default, .*gpt-2"):
        read_vocabulary(tmp_path / "v.gguf")
    with pytest.raises(ValueError, match="tokenizer 't5', supported are gpt2, llama, gemma4"):
        Tokenizer.from_gguf({"tokenizer.ggml.model": "t5"}, tmp_path)
    with pytest.raises(ValueError, match="incomplete: it has no metadata 'tokenizer.ggml.tokens'"):
        Tokenizer.from_gguf({"tokenizer.ggml.model": "gpt2"}, tmp_path)
