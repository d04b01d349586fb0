"""Tokenizers out of GGUF metadata: byte-pair merges over bytes, and SentencePiece's pieces with scores."""

from __future__ import annotations

from collections.abc import Sequence

from pyspec.entries import Entries

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # token types
SPACE = "\u2581"  # how SentencePiece spells a space


def merges_backend(
    entries: Entries, texts: Sequence[str], splits: Sequence[str], ignore_merges: bool, byte_level: bool
):
    """Byte-pair merges over bytes that are spelled as printable characters (GPT-2, Llama 3, Qwen).

    Or, not byte_level, over characters, with spaces spelled as SentencePiece does (Gemma 4).
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    vocabulary = {text: token for token, text in enumerate(texts)}
    merges = []
    for merge in entries.array("merges", str):
        left, space, right = merge[:1] + merge[1:].partition(" ")[0], " " in merge[1:], merge[1:].partition(" ")[2]
        if not space:
            raise entries.wrong("merges", merge, "two tokens with a space between them")
        if {left, right, left + right} <= vocabulary.keys():  # others can never come about
            merges.append((left, right))
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in splits]
    if not byte_level:
        unknown = token_id(entries, "unknown", len(texts))
        rest = {"byte_fallback": True, "unk_token": None if unknown is None else texts[unknown]}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges, **rest))
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
        return backend
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece_backend(entries: Entries, texts: Sequence[str], types: Sequence[int]):
    """SentencePiece's byte-pair model: pieces with scores, the best merge first, bytes for unknown characters."""
    import tokenizers
    from tokenizers import models, normalizers

    scores = entries.array("scores", (int, float))
    if len(scores) < len(texts):
        raise entries.wrong("scores", scores, f"one for each of {len(texts)} tokens")
    vocabulary = {text: token for token, text in enumerate(texts)}
    # pieces with score 0 that only the file's author listed, such as control tokens, are in no merge
    is_piece = [type not in (UNKNOWN, CONTROL, BYTE) for type in types]
    ranked = sorted((token for token in range(len(texts)) if is_piece[token]), key=lambda token: -scores[token])
    merges = [
        (text[:cut], text[cut:])
        for text in (texts[token] for token in ranked)
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    unknown = texts[token_id(entries, "unknown", len(texts), 0)]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Replace(" ", SPACE)]
    if entries.flag("add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    return backend


def add_tokens(backend, texts: Sequence[str], types: Sequence[int], ends: frozenset[str]) -> None:
    """Tells the backend which tokens are names rather than text: by their types, and ends whatever theirs is."""
    import tokenizers

    types = [CONTROL if text in ends else kind for text, kind in zip(texts, types, strict=False)]
    for wanted, special in ((UNKNOWN, True), (CONTROL, True), (USER_DEFINED, False)):
        named = [text for text, kind in zip(texts, types, strict=True) if kind == wanted]
        backend.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False) for text in named])


def token_id(entries: Entries, name: str, count: int, default: int | None = None) -> int | None:
    """The token of a name such as "bos". One that is not in the vocabulary is not stated: files write -1 for none."""
    stated = entries.get(f"{name}_token_id")
    if stated is not None and type(stated) is not int:
        raise entries.wrong(f"{name}_token_id", stated, "a token")
    found = stated if stated is not None and 0 <= stated < count else default
    return found if found is not None and found < count else None
