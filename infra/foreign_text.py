"""Text that others wrote (models, manifests, notes), in which nothing can hide or rearrange the text around it."""

import re
import unicodedata

_USER_IN_URL = re.compile(r"(?<=://)[^/\s]*@")
ESCAPED = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # Unicode's categories of characters that have no glyph


def spelled(character: str) -> str:
    """Return a character, or its escape if it controls a terminal, has no glyph or changes the writing direction."""
    # Zero width joiners (Cf) make emoji and Indic letters what they are.
    if character in "\u200c\u200d" or unicodedata.category(character) not in ESCAPED:
        return character
    names = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    if character in names:
        return names[character]
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def without_passwords(text: str) -> str:
    """Return text with `***` in place of a user and password before the host of a URL."""
    return _USER_IN_URL.sub("***@", text) if "@" in text else text


def for_terminal(text: str) -> str:
    """Return text of any lines as a terminal may show it: only line ends and tabs keep their effect."""
    if text.isascii() and text.isprintable():
        return text
    lines = text.replace("\r\n", "\n")
    return "".join(character if character in "\n\t" else spelled(character) for character in lines)
