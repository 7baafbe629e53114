"""Text for people: safe to print, easy to read."""

import unicodedata


def plain(text: str, limit: int | None = None) -> str:
  """Text that cannot steer a terminal: control, format and unpaired surrogate characters become visible escapes.

  Newlines and tabs stay. rich's markup is left as it is: whoever prints must not read it as markup.

  Args:
    text: any text, such as a model's response.
    limit: most characters kept; the rest is replaced by a count.
  """
  dropped = 0
  if limit is not None and len(text) > limit:
    text, dropped = text[:limit], len(text) - limit
  safe = "".join(
      c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
      else c.encode("unicode_escape").decode("ascii") for c in text)
  return safe + (f" [... {dropped:,} more characters]" if dropped else "")


_MARKDOWN = str.maketrans({c: "\\" + c for c in "\\|`[$"} | {"<": "&lt;", "&": "&amp;", "\n": " ", "\r": " "})


def markdown(text: str) -> str:
  """Text on one line of Markdown that starts no cell, code, link, formula or HTML; emphasis stays, it does no harm."""
  return plain(text).translate(_MARKDOWN)


def duration(seconds: float) -> str:
  """Hours, minutes and seconds, such as 1:02:03."""
  minutes, s = divmod(round(seconds), 60)
  h, m = divmod(minutes, 60)
  return f"{h}:{m:02d}:{s:02d}"
