"""Text that is not UTF-8: whether it can be Windows-1252, and which encodings it may be instead.

Nothing in the bytes says which encoding they are in, so what they read as is judged: Windows-1252 has the letters of
Western Europe, a few at a time in a word; a word such as "Êîðîëü" or "Pøíbìhy" is in none of its languages.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

# The letters beyond ASCII of a language that Windows-1252 serves; š and ž have the same bytes in Windows-1250.
_ALPHABETS = [
    frozenset(letters + "šž")
    for letters in (
        "àâæçéèêëîïôœùûüÿö",  # French
        "äöüßéà",  # German
        "áàçéèíïñóòôúüýâêîûäöå",  # Spanish, Catalan, Irish, Welsh
        "áàâãçéêíóôõúü",  # Portuguese
        "àèéìíîòóùú",  # Italian
        "åäöæøéèêüàóòôâ",  # Swedish, Danish, Norwegian, Finnish
        "áðéíóúýþæöø",  # Icelandic, Faroese
        "éèëïöüêçáàíóôúä",  # Dutch
        "äöüõ",  # Estonian
    )
]
# Signs that no word has between two of its letters: what Windows-1252 makes of another encoding's letters
_SIGNS = "¡¢£¤¥¦§¨©ª«¬®¯°±²³µ¶¸¹º»¼½¾¿†‡ˆ˜‰‹›ƒ„‚÷"
_L = "A-Za-zÀ-ÖØ-öø-ÿŒœŠšŽžŸ"
_ODD = re.compile(
    rf"[{_L}][{_SIGNS}]+[{_L}]|[{_SIGNS}]{{3}}|£[{_L}]|[{_L}][¹¿¦¬¤¼]"
    r"|[a-zß-ÿ][À-ÞŠŽŒ][a-zß-ÿ]"  # a capital inside a word: Mac's é is Ž
    rf"|õ(?![{_L}])|[{_L}]{{3}}û(?![{_L}])|þ(?![aeiouyrvjáéíóúýæö])"  # Hungarian's ő and ű, Turkish ş
)
_LETTERS = re.compile(rf"[{_L}]+")
_WORDS = re.compile(r"[^\W\d_]+")
_UNDEFINED = re.compile("[\x80-\x9f]")
SUSPECT = 0.1  # share of lines that read as no language from which Windows-1252 is not believed
SAMPLED = 4000  # lines judged

# Encodings that a file is tried in, beside Windows-1252, as --encoding takes them
_SINGLE = ("cp1251", "koi8-r", "cp1250", "iso8859-2", "cp1254", "cp1253", "cp1257", "cp866", "cp437", "mac-roman")
_MULTI = ("shift_jis", "euc_kr", "euc_jp", "big5", "gb18030")  # of equals the narrower first
# standard -> first and last lead byte of its common characters
_COMMON = {
    "shift_jis": ("euc_jp", 0xA4, 0xCF),
    "euc_jp": ("euc_jp", 0xA4, 0xCF),
    "gb18030": ("gb2312", 0xB0, 0xD7),
    "big5": ("big5", 0xA4, 0xC6),
    "euc_kr": ("euc_kr", 0xB0, 0xC8),
}
_CENTRAL = (
    frozenset("ąćęłńóśźż"),  # Polish
    frozenset("áčďéěíňóřšťúůýžĺľŕäô"),  # Czech, Slovak
    frozenset("áéíóöőúüű"),  # Hungarian
    frozenset("ăâîșțşţ"),  # Romanian
    frozenset("čćđšž"),  # Croatian, Slovene
    frozenset("çğıİöşüâîû"),  # Turkish
    frozenset("āčēģīķļņšūžąęėįųõäöü"),  # Baltic
)


def _in_one(word: str, alphabets: Sequence[frozenset[str]]) -> bool:
    wide = {c for c in word.lower() if not c.isascii()}
    return any(wide <= letters for letters in alphabets)


def suspect(text: str) -> bool:
    """Whether a line that was read as Windows-1252 holds a word of no language which that encoding serves."""
    if _UNDEFINED.search(text) or _ODD.search(text):
        return True
    for word in _LETTERS.findall(text):
        runs = re.findall(r"[^\x00-\x7f]+", word)
        if runs and (max(map(len, runs)) > 3 or not _in_one(word, _ALPHABETS)):
            return True
    return False


def _fitness(text: str, codec: str) -> float:
    """How well text reads in the languages of its encoding, 0 to 1: the share of its characters beyond ASCII."""
    wide = [c for c in text if not c.isascii()]
    if not wide:
        return 0.0
    if codec in _COMMON:
        standard, low, high = _COMMON[codec]
        codes = [c.encode(standard, "ignore") for c in wide]
        return sum(len(code) == 2 and low <= code[0] <= high for code in codes) / len(wide)
    good = 0
    for word in _WORDS.findall(text):
        letters = [c for c in word if not c.isascii()]
        script = {"CYRILLIC" if "Ѐ" <= c <= "ӿ" else "GREEK" if "Ͱ" <= c <= "Ͽ" else "LATIN" for c in word}
        cased = word[1:].islower() or word.isupper() or len(word) == 1
        latin = script != {"LATIN"} or _in_one(word, (*_ALPHABETS, *_CENTRAL) if codec != "cp1252" else _ALPHABETS)
        good += len(letters) * (len(script) == 1 and cased and latin)
    return good / len(wide)


def guesses(lines: Sequence[bytes]) -> list[str]:
    """The encodings in which all lines can be decoded, the most likely first; at most three, none where all read
    badly."""
    data = b"\n".join(lines)
    found = []
    for codec in ("cp1252", *_SINGLE, *_MULTI):
        try:
            text = data.decode(codec)
        except UnicodeDecodeError:
            continue
        if not _UNDEFINED.search(text):
            found.append((round(_fitness(text, codec), 2), codec))
    found.sort(key=lambda pair: -pair[0])
    return [codec for fitness, codec in found[:3] if fitness >= max(0.3, found[0][0] - 0.35)]


def wide(start: bytes) -> str:
    """The encoding of text in two or four bytes a character, by its byte order mark or the places of its zeros; ""
    for any other."""
    for mark, name in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")):
        if start.startswith(mark):
            return name
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    some = start[: 4096 - len(start) % 2]
    even, odd = some[::2].count(0), some[1::2].count(0)
    half = len(some) // 2
    if half < 4 or max(even, odd) < 0.3 * half or min(even, odd) > 0.05 * half:
        return ""
    return "utf-16-le" if odd > even else "utf-16-be"
