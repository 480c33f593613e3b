"""Text as a reader sees it: Latin letters for their twins in other alphabets, for digits, for spaced-out letters."""

import re
import unicodedata

_TWINS = dict(
    zip(
        "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u04bb\u0501\u051b\u051d\u043a\u043c\u0442\u0432"
        "\u03bf\u03b1\u03b5\u03b9\u03ba\u03bd\u03c1\u03c4\u03c5\u03c7\u0131\u0261\u0570\u057d\u0585\u217c",
        "aeopcyxijshdqwkmtboaeikvptuxighsol",
        strict=True,
    )
)
_LEET = str.maketrans("0134578@$", "oleastbas")
_MIXED = re.compile(r"(?<![\w$@])(?=[\w$@]*[a-z])(?=[\w$@]*[0-9$@])[a-z0-9$@]{3,}(?![\w$@])", re.IGNORECASE)
_SPACED = re.compile(r"\b(?:\w[ \-_.*]){3,}\w\b")


def plain(text: str) -> str:
    """The same text in plain letters. It may be shorter: ranges of one are not ranges of the other."""
    if text.isascii() and not _MIXED.search(text) and not _SPACED.search(text):
        return text
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    if any("a" <= c <= "z" for c in text):  # letters of another alphabet are twins only among Latin ones
        text = "".join(_latin(word) for word in re.split(r"(\W+)", text))
    text = _MIXED.sub(lambda m: m.group().translate(_LEET), text)
    return _SPACED.sub(lambda m: re.sub(r"[ \-_.*]", "", m.group()), text)


def _latin(word: str) -> str:
    """A word with its twins replaced, where that makes all of it Latin; a word of another alphabet stays."""
    twin = "".join(_TWINS.get(c, _TWINS.get(c.lower(), c).upper() if c.lower() in _TWINS else c) for c in word)
    return twin if twin.isascii() else word
