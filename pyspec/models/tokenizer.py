"""Tokenizer: text to tokens and back, and a model's own chat template."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path

from pyspec.arguments import check_unicode, described, read_tokens

__all__ = ["Tokenizer"]

# Ways of splitting text into words before byte-pair merging, by the names that GGUF files give them.
_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "llama-bpe": [_LLAMA3],
    "qwen2": [_LLAMA3.replace("{1,3}", "")],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}
_SPLITS |= {"llama3": _SPLITS["llama-bpe"], "deepseek-r1-qwen": _SPLITS["qwen2"]}
_LLAMA3_NAMES = ("llama-bpe", "llama3")  # here a word that is a token stays whole even if no merges lead to it

# Names under which chat models end a turn or a text.
_END_NAMES = frozenset(
    "<|im_end|> <|endoftext|> <|end_of_text|> <|eot_id|> <|eom_id|> <|end|> <end_of_turn> </s>".split()
)
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # token types in GGUF files
_SPACE = "\u2581"  # how SentencePiece spells a space


class Tokenizer:
    """Text to tokens and back.

    Args:
        backend: a tokenizers.Tokenizer.
        byte_level: its tokens are spelled in GPT-2's alphabet of bytes; otherwise as SentencePiece spells them.
        bos: the token that `encode` puts first, or None.
        eos: tokens that end a text; those with usual names for that are added.
        chat_template: Jinja source, or None.
        named_tokens: bos_token, eos_token and others that a template may use, as text.
    """

    def __init__(
        self,
        backend,
        *,
        byte_level: bool,
        bos: int | None = None,
        eos: Iterable[int] = (),
        chat_template: str | None = None,
        named_tokens: dict[str, str] | None = None,
    ):
        self.backend = backend
        self.chat_template = chat_template
        self._byte_level = byte_level
        self._spelled: dict[int, bytes] = {}
        self._bos = bos
        self._named_tokens = named_tokens or {}
        self._added = backend.get_added_tokens_decoder()
        special = {token: text for token, text in self._added.items() if text.special}
        self.eos_tokens = frozenset(eos) | {token for token, text in special.items() if text.content in _END_NAMES}

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens in order, which names the vocabulary."""
        vocabulary = sorted(self.backend.get_vocab().items(), key=lambda entry: entry[1])
        return hashlib.sha256(repr(vocabulary).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @classmethod
    def from_gguf(cls, metadata: dict, path: Path) -> Tokenizer:
        """The tokenizer that a GGUF file's metadata describes.

        Raises:
            ValueError: it is of an unknown kind, or its metadata is incomplete.
        """
        kind = metadata["tokenizer.ggml.model"]
        builders = {"gpt2": _byte_level_backend, "llama": _sentencepiece_backend}
        if kind not in builders:
            raise ValueError(f"{path} has tokenizer {kind!r}, supported are {', '.join(builders)}")
        try:
            backend = builders[kind](metadata, path)
            texts, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        except KeyError as error:
            raise ValueError(f"{path} is incomplete: it has no metadata {error}") from None
        tokenizers = _tokenizers()
        for wanted, special in ((_UNKNOWN, True), (_CONTROL, True), (_USER_DEFINED, False)):
            named = [text for text, type in zip(texts, types, strict=True) if type == wanted]
            backend.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False) for text in named])

        def token(name: str) -> int | None:
            return metadata.get(f"tokenizer.ggml.{name}_token_id")

        bos = token("bos")
        wants_bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
        return cls(
            backend,
            byte_level=kind == "gpt2",
            bos=bos if metadata.get("tokenizer.ggml.add_bos_token", wants_bos) else None,
            eos=[end for name in ("eos", "eot", "eom") if (end := token(name)) is not None],
            chat_template=metadata.get("tokenizer.chat_template"),
            named_tokens={
                f"{name}_token": texts[number] for name in ("bos", "eos") if (number := token(name)) is not None
            },
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a Hugging Face folder, or None where it has none.

        Raises:
            ValueError: a file is corrupt.
        """
        path = folder / "tokenizer.json"
        if path.is_file():
            try:
                backend = _tokenizers().Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises nothing narrower
                raise ValueError(f"{path} is corrupt: {error}") from None
        elif any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
            import transformers  # only its slow tokenizers read these files

            return cls.from_transformers(transformers.AutoTokenizer.from_pretrained(folder))
        else:
            return None
        settings = folder / "tokenizer_config.json"
        settings = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        named_tokens = {
            name: text if isinstance(text, str) else text["content"]
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (text := settings.get(name))
        }
        template = settings.get("chat_template")
        if isinstance(template, list):
            template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return cls._from_backend(backend, template, named_tokens)

    @classmethod
    def from_transformers(cls, tokenizer) -> Tokenizer:
        """The tokenizer inside a fast tokenizer of transformers.

        Raises:
            ValueError: it is not a fast one.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"tokenizer must be a fast tokenizer of transformers, got {type(tokenizer).__name__}")
        named_tokens = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
        return cls._from_backend(backend, tokenizer.chat_template, named_tokens)

    @classmethod
    def _from_backend(cls, backend, chat_template: str | None, named_tokens: dict[str, str]) -> Tokenizer:
        eos = backend.token_to_id(named_tokens.get("eos_token", ""))
        with_special, without = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
        return cls(
            backend,
            byte_level="ByteLevel" in repr(backend.decoder),
            bos=with_special[0] if with_special[:1] != without[:1] else None,
            eos=() if eos is None else (eos,),
            chat_template=chat_template,
            named_tokens=named_tokens,
        )

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a prompt, after the token for the beginning if the model wants one.

        special: read names of special tokens (`<|im_end|>`) as those tokens; they are plain text otherwise.

        Raises:
            TypeError: text is no string.
            ValueError: text has half a character, a lone surrogate, which no UTF-8 has.
        """
        tokens = self._encode(text, special)
        if self._bos is not None and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        return tokens

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the assistant answers.

        Args:
            messages: dicts with "role" and "content".

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages.
        """
        # the template writes the token for the beginning itself
        return self._encode(self.render(messages), special=True)

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The text that `chat` makes tokens of, names of special tokens included."""
        if self.chat_template is None:
            raise ValueError("this model has no chat template: encode the prompt as plain text")
        return _render(self.chat_template, messages, self._named_tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens: their bytes joined, with U+FFFD for what is not UTF-8.

        A SentencePiece tokenizer puts a space before the first word of a text, and this is in here.
        """
        return b"".join(map(self.token_bytes, read_tokens("tokens", tokens))).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be part of a character; none for special and unknown tokens."""
        if token not in self._spelled:  # one by one: spelling a whole vocabulary takes half a second
            self._spelled[token] = self._spell(token)
        return self._spelled[token]

    def _spell(self, token: int) -> bytes:
        text = self.backend.id_to_token(token) if 0 <= token < 2**32 else None
        if text is None:
            return b""
        if token in self._added:
            return b"" if self._added[token].special else self._added[token].content.encode()
        return _byte_level_bytes(text) if self._byte_level else _sentencepiece_bytes(text)

    def _encode(self, text: str, special: bool) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {described(text)}")
        check_unicode("text", text)
        self.backend.encode_special_tokens = not special
        return self.backend.encode(text, add_special_tokens=False).ids


def _tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise ImportError("text needs the package tokenizers: pip install pyspec-kernels[hf]") from None
    return tokenizers


def _byte_level_backend(metadata: dict, path: Path):
    """Byte-pair merges over bytes that are spelled as printable characters (GPT-2, Llama 3, Qwen)."""
    tokenizers = _tokenizers()
    from tokenizers import decoders, models, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITS:
        raise ValueError(f"{path} splits words by the rules {name!r}, supported are {', '.join(sorted(_SPLITS))}")
    vocabulary = {text: token for token, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in _LLAMA3_NAMES))
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in _SPLITS[name]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_backend(metadata: dict, path: Path):
    """SentencePiece's byte-pair model: pieces with scores, the best merge first, bytes for unknown characters."""
    tokenizers = _tokenizers()
    from tokenizers import models, normalizers

    texts, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocabulary = {text: token for token, text in enumerate(texts)}
    # pieces with score 0 that only the file's author listed, such as control tokens, are in no merge
    is_piece = [type not in (_UNKNOWN, _CONTROL, _BYTE) for type in metadata["tokenizer.ggml.token_type"]]
    ranked = sorted((token for token in range(len(texts)) if is_piece[token]), key=lambda token: -scores[token])
    merges = [
        (text[:cut], text[cut:])
        for text in (texts[token] for token in ranked)
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    unknown = texts[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Replace(" ", _SPACE)]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    return backend


@cache
def _bytes_of_characters() -> dict[str, int]:
    """How byte-level tokenizers spell bytes: printable Latin-1 as itself, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _byte_level_bytes(text: str) -> bytes:
    byte_of = _bytes_of_characters()
    return bytes(byte_of[character] for character in text) if byte_of.keys() >= set(text) else text.encode()


def _sentencepiece_bytes(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes.fromhex(text[3:5])
    return text.replace(_SPACE, " ").encode()


def _render(template: str, messages: Sequence[dict[str, str]], named_tokens: dict[str, str]) -> str:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ImportError("chat templates need jinja2: pip install pyspec-kernels[hf]") from None

    def raise_exception(reason: str):
        raise jinja2.TemplateError(reason)

    # the settings and helpers that templates are written for
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, **named_tokens
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the model's chat template refuses the messages: {error}") from None
