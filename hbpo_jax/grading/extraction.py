r"""From the text of a response to its answer: after the last '</think>', the last complete \boxed{...}."""

import re

OPEN = "<think>"
CLOSE = "</think>"

# A box that opens, a backslash with the character it escapes (so that \{ and \} are no braces), or a brace.
_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def visible(response: str, *, thinking_opened: bool) -> str | None:
  """The part of a response that may hold the answer, or None where the thinking never ended.

  Args:
    response: text of the response, without the prompt.
    thinking_opened: True = the prompt already ended in '<think>', so the response starts inside the thinking.
  Returns:
    The text after the last '</think>'; the whole text if it neither opens nor closes a thinking part.
  """
  end = response.rfind(CLOSE)
  if end >= 0:
    return response[end + len(CLOSE):]
  return None if thinking_opened or OPEN in response else response


def last_box(text: str) -> str | None:
  r"""The content of the last complete \boxed{...}, stripped, or None. Linear in the length of the text.

  Of nested boxes the innermost counts. A box whose brace never closes does not count.
  """
  stack: list[int] = []  # For each open brace: where the content of its box starts, or -1 for a plain brace.
  start, end = -1, -1
  for token in _TOKEN.finditer(text):
    mark = token.group()
    if mark == "{":
      stack.append(-1)
    elif mark == "}":
      opened = stack.pop() if stack else -1
      if opened > start:
        start, end = opened, token.start()
    elif mark.startswith("\\boxed"):
      stack.append(token.end())
  return text[start:end].strip() if start >= 0 else None
