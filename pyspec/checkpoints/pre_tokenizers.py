"""How byte-pair tokenizers split text into words before they merge, by the names that GGUF files have for it.

The patterns are those that llama.cpp publishes for these names: a text has to become the tokens that it becomes there.
Each pattern of a list splits the pieces that the one before it left.
"""

from __future__ import annotations

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACES
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}\p{{N}}{{1,3}}|{_MARKS}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}\p{{N}}|{_MARKS}"
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK_WORDS = _ASCII_MARKS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_CHINESE_AND_KANA = r"[一-龥぀-ゟ゠-ヿ]+"


def _cased(upper: str, lower: str, suffix: str, digits: str) -> str:
    """Words in which lower case ends what upper case began, with a suffix."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{upper}*{lower}+{suffix}|{before}{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"


# case is that of ASCII alone here, in llama.cpp too, whereas the first tokenizer.json had all cased letters
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_CASED_LETTERS = (  # as deepseek-llm lists them
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "Ὗ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ"
    "-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CHINESE_TO_KOREAN = "[一-龥ࠀ-一가-\ud7ff&&[^\\s]]+"  # llama.cpp has spaces out of the way first

# without 々, which Unicode has among it
_HAN = "一-\u9fff㐀-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ebef\U0002f800-\U0002fa1f"
# a number goes with what stands before it, up to its first digits; the next patterns part them
_DIGITS_FROM_THE_RIGHT = r"\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_ASIAN = "[一-\u9fff㐀-\u4dbf\u8c48-\ufaff぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+"


def _marked(digits: str) -> str:
    """Words with their marks and a contraction, whatever their case is."""
    words = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_CONTRACTIONS}?"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"


_NAMED = (  # names that share patterns, and these
    ("default", [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]),
    ("gpt-2 phi-2 gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4", [_GPT2]),
    ("jina-es jina-de jina-v2-es jina-v2-de", [_GPT2]),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", [r"\p{N}", _GPT2]),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", [_LLAMA3]),
    ("dbrx smaug-bpe chatglm-bpe glm4 glm5", [_LLAMA3]),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", [_QWEN2]),
    ("qwen35", [rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
                rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}"]),
    ("ufakzeka", [rf"{_WORDS}\p{{N}}|{_MARKS}"]),
    ("laguna", [r"[^\n]+|[\n]+", _QWEN2]),
    ("minicpm5", [r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORDS}\p{{N}}+|{_MARKS}"]),
    ("jais-2", [rf"{_CONTRACTIONS}|{_WORDS}\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
                + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
                + r"|\s{1,2}(?!\S)|\s"]),
    ("seed-coder", [rf"{_CONTRACTIONS}|{_WORDS}\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}"]),
    ("bailingmoe bailingmoe2 llada-moe",
     [rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORDS}\p{{N}}|"
      rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|{_SPACES}"]),
    ("exaone-moe", [rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
                    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}"]),
    ("tekken", [_cased(_UPPER, _LOWER, "", r"\p{N}")]),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", [_cased(_UPPER, _LOWER, _CONTRACTIONS + "?", r"\p{N}{1,3}")]),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4",
     [r"\p{N}{1,3}", _CHINESE_AND_KANA, rf"{_DEEPSEEK_WORDS}[\r\n]*|{_LINES}"]),
    ("spark2_5", [r"\p{N}{1,3}", _CHINESE_AND_KANA, rf"{_DEEPSEEK_WORDS}|[\r\n]|{_SPACES}", r"\p{N}"]),
    ("deepseek-coder", [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_TO_KOREAN, r"\p{N}"]),
    ("deepseek-llm", [r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。&&[^\\s]]+", r"\s+$",
                      _CHINESE_TO_KOREAN, r"\p{N}+"]),
    ("superbpe", [r"\p{N}+", r"(?=([0-9]{3})+(?![0-9]))"]),
    ("kimi-k2", [rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+{_CONTRACTIONS}?|"
                 rf"\p{{N}}{{1,3}}|{_MARKS}"]),
    ("falcon", [r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"]),
    ("poro-chat bloom gpt3-finnish", [r" ?[^(\s|.,!?…。，、।۔،)]+"]),
    ("afmoe", [_DIGITS_FROM_THE_RIGHT, _ASIAN, rf"{_DEEPSEEK_WORDS}[\r\n]*|{_LINES}"]),
    ("tiny_aya cohere2moe", [_DIGITS_FROM_THE_RIGHT, _marked(r"\p{N}{1,3}")]),
    ("youtu", ["[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
               _marked(r"\p{N}")]),
    ("chameleon", ["<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"[\t\n]|    |  ", r"\p{N}",
                   r"[\p{P}!-/:-@\[-`{-~]", _GPT2]),
    ("gemma4 sarvam-moe", [r"\n+"]),
    ("viking", [r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"]),
)  # fmt: skip
SPLITS = {name: patterns for names, patterns in _NAMED for name in names.split()}

# where a word that is a token stays whole even if no merges lead to it
IGNORE_MERGES = frozenset(
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano glm4 glm5 tekken minicpm5 "
    "youtu gemma4".split()
)
# where a text begins with the token for that unless the file says otherwise
WANTS_BOS = frozenset(
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken chameleon gemma4".split()
)
# where merges are of characters, not of bytes
OVER_CHARACTERS = frozenset("gemma4 sarvam-moe".split())
