"""Arguments read by what they are: token ids out of lists, arrays, tensors and tokenizers' results, numbers, text."""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable, Iterator, Mapping, Set, Sized
from itertools import chain, islice
from numbers import Real

_IDS = "token ids: a list, an array or a tensor of them, as tokenizer.encode makes of text"
# what tokenizers return beside token ids that does not change what a language model reads
_HARMLESS = {"token_type_ids", "special_tokens_mask", "offset_mapping", "length"}


def read_prompts(tokens, most: int) -> tuple[bool, list[list[int]]]:
    """Whether tokens is a batch, and the token ids of its prompts, which may be any integers, or none.

    A prompt is what read_tokens takes, a batch is an iterable of prompts, or an array or tensor of two dimensions. The
    first element decides which it is: a list of tensors of one element each is a batch. A mapping has either as its
    input_ids; what its attention_mask hides at the ends of a prompt is padding and left out.

    most: an iterator is read no further than one token beyond; it may have no end.

    Raises:
        TypeError: tokens, or a part of it, is something else.
        ValueError: an attention_mask does not fit, or hides tokens in the middle.
    """
    ids, mask = _opened("tokens", tokens)
    rows = _items("tokens", ids)
    first = list(islice(rows, 1))
    if isinstance(rows, Iterator):
        rows = chain(first, rows)
    if not first or is_scalar(first[0]):
        return False, [_ids("tokens", rows, mask, most)]
    rows = list(rows)
    masks = [None] * len(rows) if mask is None else list(_items("attention_mask", mask))
    if len(masks) != len(rows):
        raise ValueError(f"attention_mask must have a row for each of the {len(rows)} prompts, got {len(masks)}")
    prompts = []
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        name = f"tokens[{index}]"
        ids, own_mask = _opened(name, row)
        prompts.append(_ids(name, _items(name, ids), own_mask if mask is None else mask, most))
    return True, prompts


def read_tokens(name: str, tokens) -> list[int]:
    """The ids of one text: an iterable of integers, an integer array or tensor of one dimension, or a tokenizer's
    encoding. Raises TypeError for anything else.
    """
    ids, mask = _opened(name, tokens)
    return _ids(name, _items(name, ids), mask)


def read_integer(name: str, value, wanted: str = "an integer") -> int:
    """A whole number: an int, or an integer of NumPy or torch without dimensions; raises TypeError for anything else,
    for bools too.
    """
    plain = _plain(value)
    if isinstance(plain, bool) or not hasattr(plain, "__index__") or hasattr(plain, "tolist"):
        raise TypeError(f"{name} must be {wanted}, got {described(value)}")
    return operator.index(plain)


def read_number(name: str, value) -> float:
    """A real number of Python, NumPy or torch without dimensions; raises TypeError for anything else, for bools too."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise TypeError(f"{name} must be a number, got {described(value)}")
    try:
        return float(plain)
    except OverflowError:
        return float("inf") if plain > 0 else float("-inf")


def decode_text(name: str, data: bytes) -> str:
    """Text in UTF-8, with or without a byte order mark, or in UTF-16 with one; its lines end with a line feed alone.

    Raises:
        ValueError: it is neither; the message tells where.
    """
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8 text, got byte 0x{data[error.start]:02x} at {error.start}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_unicode(name: str, text: str) -> None:
    """Raises ValueError for a string with a lone surrogate: half a character, or a byte that was no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text that UTF-8 can hold, got {described(text)} with half a character at {error.start}"
        ) from None


def is_scalar(value) -> bool:
    """Whether a value is a number, not a list or an array of them."""
    return isinstance(value, Real) or (hasattr(value, "__index__") and not getattr(value, "ndim", 0))


def described(value) -> str:
    """A value for an error message, in one line that is not long."""
    if hasattr(value, "dtype") and getattr(value, "ndim", 0):
        return f"{type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


# ==== what token ids come in ====


def _opened(name: str, value) -> tuple:
    """Token ids and their attention mask, or None: the parts of a mapping or of a tokenizers.Encoding."""
    if not isinstance(value, Mapping):
        is_encoding = hasattr(value, "ids") and hasattr(value, "attention_mask")
        return (value.ids, value.attention_mask) if is_encoding else (value, None)
    if "input_ids" not in value:
        raise ValueError(f"{name} must have input_ids where it is a mapping, got one with {described(list(value))}")
    ids, mask = value["input_ids"], value.get("attention_mask")
    for key in value.keys() - _HARMLESS - {"input_ids", "attention_mask"}:
        raise ValueError(f"{name} must have nothing beside input_ids and attention_mask that is read, got {key!r}")
    return ids, mask


def _items(name: str, value) -> Iterable:
    """The elements of an iterable, an iterator where it has no length; of arrays Python's numbers or lists."""
    plain = _plain(value)
    if not isinstance(plain, (str, bytes, bytearray, Mapping, Set)) and not hasattr(plain, "tolist"):
        try:
            elements = iter(plain)
        except TypeError:
            pass
        else:
            return plain if isinstance(plain, Sized) else elements
    raise TypeError(f"{name} must be {_IDS}, got {described(value)}")


def _plain(value):
    """What an array or a tensor holds, in Python's numbers and lists; anything else as it is."""
    if not hasattr(value, "tolist"):
        return value
    try:
        return value.tolist()
    except (RuntimeError, NotImplementedError, TypeError):  # torch has tensors without data, sparse and nested ones
        return value


def _ids(name: str, items: Iterable, mask, most: int | None = None) -> list[int]:
    """The token ids of one text, without what its mask says is padding; of an iterator at most one more than most."""
    if isinstance(items, Iterator) and mask is None and most is not None:
        items = islice(items, most + 1)
    items = list(items)
    if not set(map(type, items)) <= {int}:
        for place, item in enumerate(items):
            try:
                items[place] = read_integer(name, item)
            except TypeError:
                raise TypeError(f"{name} must be {_IDS}, got {described(item)} at {place}") from None
    if mask is None:
        return items
    mask = list(_items("attention_mask", mask))
    if len(mask) != len(items) or any(_plain(seen) not in (0, 1) for seen in mask):
        raise ValueError(
            f"attention_mask must have a 0 or 1 for each of the {len(items)} tokens of {name}, got {described(mask)}"
        )
    seen = [place for place, one in enumerate(mask) if one]
    if seen and len(seen) != seen[-1] - seen[0] + 1:
        raise ValueError(f"attention_mask must hide padding at the ends of {name} alone, got {described(mask)}")
    return [items[place] for place in seen]
