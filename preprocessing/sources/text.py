"""Text from outside: decode it, and replace what is not valid Unicode."""

import codecs
from typing import Any

_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def decode_text(data: bytes) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark; invalid bytes become U+FFFD."""
    return data.decode(_encoding(data), "replace")


def _encoding(data: bytes) -> str:
    return next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")


def replaced_row(data: bytes) -> int | None:
    """Return the row, from 1, of the first bytes that `decode_text` replaces; None if it replaces none."""
    try:
        data.decode(_encoding(data))
    except UnicodeDecodeError as error:
        return decode_text(data[: error.start]).count("\n") + 1
    return None


def clean_text(text: str) -> str:
    """Return the text with U+FFFD for each lone surrogate: half of a character, or a byte that is not UTF-8."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def text_of(value: Any) -> str | None:
    """Return a value of JSON, CSV or Parquet as text: None for null and for NaN, numbers as written.

    Raise TypeError for lists and objects.
    """
    if isinstance(value, bytes):
        return clean_text(decode_text(value))
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, str | int | float):  # bool included
        return clean_text(str(value))
    raise TypeError(f"{type(value).__name__} in place of text")
