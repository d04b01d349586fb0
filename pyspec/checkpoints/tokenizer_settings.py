"""Special tokens and chat templates of a folder, which stand beside its tokenizer.json, read as transformers does.

Special tokens stand in tokenizer_config.json and special_tokens_map.json. The second wins, unless the first lists
added_tokens_decoder, as newer files do: then the second is not read. Templates in files of their own win over those in
tokenizer_config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyspec.checkpoints.huggingface import read_json
from pyspec.entries import Entries

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OF_CLASS = {  # special tokens that a tokenizer's class has of its own
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
}


@dataclass(frozen=True)
class TokenizerSettings:
    """Special tokens by their names (bos_token, ...), tokens to add as dicts of AddedToken's arguments, and templates.

    added holds those that are special only because of these files; template_source is the file of the templates.
    """

    named_tokens: dict[str, str]
    added: list[dict]
    chat_template: str | dict[str, str] | None
    template_source: str

    def add_tokens_to(self, backend) -> None:
        """Makes special, or adds, what the backend does not know as an added token yet."""
        from tokenizers import AddedToken

        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        for token in self.added:
            if token["content"] not in known:
                backend.add_tokens([AddedToken(**token)])


def read_settings(folder: Path) -> TokenizerSettings:
    """The settings of a folder.

    Raises:
        ValueError: a file is no JSON, or an entry is not what it should be; the message names both.
    """
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    entries = Entries(str(file), config)
    stated = entries
    templates, source = _templates(folder, entries)
    if "added_tokens_decoder" in entries:
        decoder = entries.part("added_tokens_decoder")
        added = [_token(entries, "added_tokens_decoder", token) for token in decoder.values()]
    else:
        added = []
        legacy = folder / "added_tokens.json"
        added = [{"content": text, "special": False} for text in _in_order(legacy)] if legacy.is_file() else []
        file = folder / "special_tokens_map.json"
        if file.is_file():
            entries = Entries(str(file), config | read_json(file))
    model = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    is_qwen2 = model.get("model_type") == "qwen2"  # whatever class its files name
    defaults = _OF_CLASS.get(
        "Qwen2Tokenizer" if is_qwen2 else str(config.get("tokenizer_class")).removesuffix("Fast"), {}
    )
    named = {}
    for name in [*_NAMES, *(name for name in entries.keys() if name.endswith("_token") and name not in _NAMES)]:
        value = entries.get(name, None if entries.is_null(name) else defaults.get(name))
        if isinstance(value, (str, dict)):
            named[name] = _token(entries, name, value)
        elif value is not None and name in _NAMES:
            raise entries.wrong(name, value, "a token")
    # the two names of one list; here tokenizer_config.json wins
    keys = ("extra_special_tokens", "additional_special_tokens")
    found = [(where, key) for where in (stated, entries) for key in keys if where.get(key)]
    for where, key in found[:1]:
        extra = where.get(key)
        if isinstance(extra, dict):
            named |= {name: _token(where, key, token) for name, token in extra.items()}
        elif isinstance(extra, list):
            added += [_token(where, key, token) for token in extra]
        else:
            raise where.wrong(key, extra, "a list of tokens, or tokens by their names")
    special = {token["content"] for token in named.values()}
    added = [token | {"special": token["special"] or token["content"] in special} for token in added]
    texts = {name: token["content"] for name, token in named.items()}
    return TokenizerSettings(texts, [*added, *named.values()], templates, source)


def _token(entries: Entries, key: str, token) -> dict:
    """A token as the arguments of tokenizers.AddedToken; a string is a special one."""
    if isinstance(token, str):
        return {"content": token, "special": True, "normalized": False}
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise entries.wrong(key, token, "a string, or entries with content")
    flags = {
        name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in token
    }
    if not set(map(type, flags.values())) <= {bool}:
        raise entries.wrong(key, token, "flags that are true or false")
    return {"content": token["content"], "special": key != "added_tokens_decoder", **flags}


def _in_order(file: Path) -> list[str]:
    """The tokens of added_tokens.json by their numbers."""
    numbers = read_json(file)
    if not set(map(type, numbers.values())) <= {int}:
        raise ValueError(f"{file} is corrupt: it must hold the number of each token")
    return sorted(numbers, key=numbers.get)


def _templates(folder: Path, entries: Entries) -> tuple[str | dict[str, str] | None, str]:
    """The chat templates of a folder, by their names where there are several, and the file that they are in."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: _read_text(file) for name, file in files.items() if file.is_file()}
    if found:
        return _one_or_several(found), str(folder / "chat_template.jinja" if "default" in found else folder)
    template = entries.get("chat_template")
    if isinstance(template, list):
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in template):
            raise entries.wrong("chat_template", template, "a template, or a list of entries with name and template")
        template = {entry["name"]: entry.get("template") for entry in template}
    texts = list(template.values()) if isinstance(template, dict) else [template] if template is not None else []
    if not all(isinstance(text, str) for text in texts):
        raise entries.wrong("chat_template", template, "a template, or a list of entries with name and template")
    return _one_or_several(template) if isinstance(template, dict) else template, entries.name


def _one_or_several(templates: dict[str, str]) -> str | dict[str, str]:
    return templates["default"] if templates.keys() == {"default"} else templates


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file} cannot be read as text: {error}") from None
