"""Where the answer of a response is."""

import time

import pytest

from hbpo_jax.grading import extraction


@pytest.mark.parametrize(("response", "opened", "expected"), [
    ("work</think> done", False, " done"),
    ("work</think> done", True, " done"),
    ("<think>a</think>b<think>c</think>d", False, "d"),
    ("<think>work", False, None),
    ("work", True, None),
    ("work", False, "work"),
    ("", False, ""),
    ("", True, None),
    ("</think>", True, ""),
])
def test_visible_text(response, opened, expected):
  assert extraction.visible(response, thinking_opened=opened) == expected


@pytest.mark.parametrize(("text", "expected"), [
    (r"\boxed{4}", "4"),
    (r"\boxed{4} then \boxed{5}", "5"),
    (r"\boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
    (r"\boxed {4}", "4"),
    (r"\boxed{\boxed{13}}", "13"),
    (r"\boxed{4} and \boxed{5", "4"),
    (r"\boxed{ see \boxed{5}", "5"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\left\{x\right\}}", r"\left\{x\right\}"),
    (r"\boxed{\{}", r"\{"),
    (r"\boxed{a \\ b}", r"a \\ b"),
    (r"}} \boxed{3}", "3"),
    (r"\boxed{}", ""),
    (r"\boxed{4} \boxed{}", ""),
    (r"\boxed{\frac{1}{2}", None),
    (r"\boxed{41\}", None),
    (r"\boxed 5", None),
    (r"\framebox{5}", None),
    (r"\box{5}", None),
    ("5", None),
])
def test_last_complete_box(text, expected):
  assert extraction.last_box(text) == expected


@pytest.mark.parametrize("text", [
    "\\boxed{" * 100_000, "{" * 300_000 + "\\boxed{1}", "\\boxed{" + "{" * 200_000 + "}" * 200_000 + "}"])
def test_time_is_linear(text):
  start = time.process_time()
  extraction.last_box(text)
  assert time.process_time() - start < 2.0
