"""Tokenizer: text to tokens and back, and a model's own chat template."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path

from pyspec.arguments import check_unicode, described, read_tokens
from pyspec.checkpoints import gguf_tokenizer
from pyspec.checkpoints.chat_templates import render_chat, select_template
from pyspec.checkpoints.gguf_tokenizer import CONTROL
from pyspec.checkpoints.pre_tokenizers import IGNORE_MERGES, OVER_CHARACTERS, WANTS_BOS
from pyspec.checkpoints.pre_tokenizers import SPLITS as _SPLITS
from pyspec.checkpoints.tokenizer_settings import read_settings
from pyspec.entries import Entries

# Names under which chat models end a turn or a text.
_END_NAMES = frozenset(
    "<|im_end|> <|endoftext|> <|end_of_text|> <|eot_id|> <|eom_id|> <end_of_turn> </s> <eos> <turn|> <EOT> _<EOT> "
    "[EOT] [EOS] [e~[ <end_of_utterance> <｜end▁of▁sentence｜> <|tool_response> <|return|> <|call|> <|calls|> "
    "<|flush|>".split()
)
_END = "<|end|>"  # the end of a turn for some, but of the reasoning alone where there is one of these:
_ENDS_BEYOND = frozenset("<|return|> <|call|> <|calls|> <|flush|>".split())
_CHANNEL_MARKS = frozenset("<|start|> <|channel|> <|message|>".split())  # of gpt-oss: a header is between them
_ENCODING = threading.Lock()


class Tokenizer:
    """Text to tokens and back.

    Args:
        backend: a tokenizers.Tokenizer.
        byte_level: its tokens are spelled in GPT-2's alphabet of bytes; otherwise as SentencePiece spells them.
        bos: the token that `encode` puts first, or None.
        eos: tokens that end a text. Special tokens with usual names for that are added, `<|end|>` only where the
            chat template writes it.
        chat_template: Jinja source, or sources by their names, or None.
        named_tokens: bos_token, eos_token and others that a template may use, as text.
        source: where all this comes from, for errors.
    """

    def __init__(
        self,
        backend,
        *,
        byte_level: bool,
        bos: int | None = None,
        eos: Iterable[int] = (),
        chat_template: str | dict[str, str] | None = None,
        named_tokens: dict[str, str] | None = None,
        source: str = "the model",
    ):
        self.backend = backend
        self.chat_template = chat_template
        self.source = source
        self._byte_level = byte_level
        self._spelled: dict[int, bytes] = {}
        self._bos = bos
        self._named_tokens = named_tokens or {}
        self._added = backend.get_added_tokens_decoder()
        special = {text.content: token for token, text in self._added.items() if text.special}
        named = _named_ends(special.keys())
        if _END not in str(chat_template):
            named -= {_END}
        self.eos_tokens = frozenset(eos) | {special[name] for name in named}
        marks = special.keys() & _CHANNEL_MARKS
        #: Names of the special tokens that head the messages of channels, by token; none where one of them is missing.
        self.channel_marks = {special[name]: name for name in marks} if len(marks) == len(_CHANNEL_MARKS) else {}

    def to_json(self) -> dict:
        """All that it is made of, as JSON has it."""
        return {
            "backend": self.backend.to_str(),
            "byte_level": self._byte_level,
            "bos": self._bos,
            "eos": sorted(self.eos_tokens),
            "chat_template": self.chat_template,
            "named_tokens": self._named_tokens,
        }

    @classmethod
    def from_json(cls, parts: dict, path: Path) -> Tokenizer:
        """The tokenizer that `to_json` was of, out of a file."""
        backend = _tokenizers().Tokenizer.from_str(parts["backend"])
        return cls(**parts | {"backend": backend, "source": str(path)})

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens in order, which names the vocabulary."""
        vocabulary = sorted(self.backend.get_vocab().items(), key=lambda entry: entry[1])
        return hashlib.sha256(repr(vocabulary).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @classmethod
    def from_gguf(cls, metadata: dict, path: Path) -> Tokenizer | None:
        """The tokenizer that a GGUF file's metadata describes, or None where it describes none.

        Raises:
            ValueError: it is of an unknown kind, or its metadata is incomplete or wrong.
        """
        entries = Entries(str(path), metadata, prefix="tokenizer.ggml.", noun="metadata ")
        kind = entries.text("model", "none")
        if kind in ("none", "no_vocab"):
            return None
        if kind not in ("gpt2", "llama", "gemma4"):
            raise ValueError(f"{path} has tokenizer {kind!r}, supported are gpt2, llama, gemma4")
        name = "gemma4" if kind == "gemma4" else entries.text("pre", "") or "default"
        if kind == "gpt2" and name not in _SPLITS:
            raise ValueError(f"{path} splits words by the rules {name!r}, supported are {', '.join(sorted(_SPLITS))}")
        texts = [text or f"[EMPTY_{token}]" for token, text in enumerate(entries.array("tokens", str))]
        if not texts or len(set(texts)) < len(texts):
            raise entries.wrong("tokens", texts, "tokens that all differ, at least one")
        types = entries.array("token_type", int, [gguf_tokenizer.NORMAL] * len(texts))
        if len(types) < len(texts):
            raise entries.wrong("token_type", types, f"one for each of {len(texts)} tokens")
        _tokenizers()
        byte_level = kind == "gpt2" and name not in OVER_CHARACTERS
        if kind == "llama":
            backend = gguf_tokenizer.sentencepiece_backend(entries, texts, types)
        else:
            backend = gguf_tokenizer.merges_backend(entries, texts, _SPLITS[name], name in IGNORE_MERGES, byte_level)
        # </s> is plain text in some vocabularies
        named = {text for text, kind in zip(texts, types, strict=False) if text != "</s>" or kind == CONTROL}
        ends = _named_ends(named)
        gguf_tokenizer.add_tokens(backend, texts, types, ends)

        def token(name: str, default: int) -> int | None:
            return gguf_tokenizer.token_id(entries, name, len(texts), default if kind == "llama" else None)

        bos, eos = token("bos", 1), token("eos", 2)
        stated = [eos, *(gguf_tokenizer.token_id(entries, name, len(texts)) for name in ("eot", "eom"))]
        wants_bos = entries.flag("add_bos_token", kind == "llama" or name in WANTS_BOS) or kind == "gemma4"
        named_tokens = {"bos_token": bos, "eos_token": eos, "unk_token": token("unknown", 0)}
        named_tokens["pad_token"] = gguf_tokenizer.token_id(entries, "padding", len(texts))
        return cls(
            backend,
            byte_level=byte_level,
            bos=bos if wants_bos else None,
            eos=[end for end in stated if end is not None] + [backend.token_to_id(end) for end in ends],
            chat_template=_gguf_templates(path, metadata),
            named_tokens={name: texts[number] for name, number in named_tokens.items() if number is not None},
            source=str(path),
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
            settings = read_settings(folder)
            settings.add_tokens_to(backend)
            return cls._from_backend(backend, settings.chat_template, settings.named_tokens, settings.template_source)
        if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
            return None
        try:
            import transformers  # only its slow tokenizers read these files
        except ImportError:
            raise ImportError(f"{folder} has no tokenizer.json, and the older files need transformers") from None
        try:
            return cls.from_transformers(transformers.AutoTokenizer.from_pretrained(folder))
        except (OSError, RuntimeError, LookupError, TypeError, ImportError) as error:
            raise ValueError(f"{folder} has a tokenizer that cannot be read: {error}") from None

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
        source = tokenizer.name_or_path or type(tokenizer).__name__
        return cls._from_backend(backend, tokenizer.chat_template, named_tokens, str(source))

    @classmethod
    def _from_backend(cls, backend, chat_template, named_tokens: dict[str, str], source: str) -> Tokenizer:
        eos = backend.token_to_id(named_tokens.get("eos_token", ""))
        with_special, without = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
        return cls(
            backend,
            byte_level="ByteLevel" in repr(backend.decoder),
            bos=with_special[0] if with_special[:1] != without[:1] else None,
            eos=() if eos is None else (eos,),
            chat_template=chat_template,
            named_tokens=named_tokens,
            source=source,
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

    def chat(self, messages: Sequence[dict], **options) -> list[int]:
        """The tokens of a conversation, up to where the assistant answers. See `render` for the arguments.

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages.
        """
        # the template writes the token for the beginning itself
        return self._encode(self.render(messages, **options), special=True)

    def render(
        self,
        messages: Sequence[dict],
        *,
        tools: Sequence[dict] | None = None,
        documents: Sequence[dict] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **variables,
    ) -> str:
        """The text that `chat` makes tokens of, names of special tokens included.

        Args:
            messages: dicts with "role" and "content".
            tools: JSON schemas of functions that the model may call.
            documents: dicts with "title" and "text" that it may read.
            chat_template: the name of one of the model's templates, or the source of another.
            add_generation_prompt: end with what an answer begins with.
            variables: what else this model's template knows, such as enable_thinking or reasoning_effort.

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages.
        """
        template = select_template(self.chat_template, chat_template, tools is not None)
        variables = self._named_tokens | variables | {"tools": tools, "documents": documents}
        variables["add_generation_prompt"] = add_generation_prompt
        return render_chat(template, messages, variables, self.source)

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
        with _ENCODING:  # the setting is the backend's, and threads of a server share it
            self.backend.encode_special_tokens = not special
            return self.backend.encode(text, add_special_tokens=False).ids


def _tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise ImportError("text needs the package tokenizers: pip install pyspec-kernels[hf]") from None
    return tokenizers


def _named_ends(texts: Collection[str]) -> frozenset[str]:
    """Those of a vocabulary's tokens that end a turn or a text by their names."""
    named = (_END_NAMES | {_END}).intersection(texts)
    if "<|tool_response>" in named:  # Gemma 4, where </s> is text
        named -= {"</s>"}
    return named if _ENDS_BEYOND.isdisjoint(named) else named - {_END}


def _gguf_templates(path: Path, metadata: dict) -> str | dict[str, str] | None:
    """The default template and those with names, tokenizer.chat_template.NAME."""
    key = "tokenizer.chat_template"
    entries = Entries(str(path), metadata, prefix=key, noun="metadata ")
    default = entries.text("") if "" in entries else None
    named = {name.removeprefix(key + "."): entries.text(name.removeprefix(key)) for name in metadata
             if name.startswith(key + ".")}  # fmt: skip
    if not named:
        return default
    return named if default is None else {"default": default} | named


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
    return text.replace(gguf_tokenizer.SPACE, " ").encode()
