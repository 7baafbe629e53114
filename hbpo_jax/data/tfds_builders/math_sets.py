"""Our TFDS builders, one class of a few lines per data set.

No download was possible where these were written: the locations and field names are those that other public projects
use, and the downloads are tested against a local server only. `HF_ENDPOINT` chooses a mirror of the hub.
"""

from typing import Any, ClassVar

from hbpo_jax.data import choices
from hbpo_jax.data.tfds_builders.base import HubProblems


class DeepscalerPreview(HubProblems):
  """DeepScaleR-Preview, about 40,000 training problems."""

  REPO: ClassVar[str] = "agentica-org/DeepScaleR-Preview-Dataset"
  FILES: ClassVar[dict[str, str]] = {"train": "deepscaler.json"}

  def convert(self, row: dict[str, Any], index: int) -> dict[str, Any]:
    return {"id": f"deepscaler/{index}", "problem": row["problem"], "answer": _text(row["answer"])}


class Math500(HubProblems):
  """MATH500."""

  REPO: ClassVar[str] = "HuggingFaceH4/MATH-500"
  FILES: ClassVar[dict[str, str]] = {"test": "test.jsonl"}

  def convert(self, row: dict[str, Any], index: int) -> dict[str, Any]:
    name = row["unique_id"].removesuffix(".json")
    return {
        "id": f"math500/{name}", "problem": row["problem"], "answer": _text(row["answer"]), "level": int(row["level"])}


class Olympiadbench(HubProblems):
  """OlympiadBench: open-ended, text only, mathematics, English, competition.

  The hub file has 674 problems, the copy that most papers evaluate on 675.
  """

  REPO: ClassVar[str] = "Hothan/OlympiadBench"
  FILES: ClassVar[dict[str, str]] = {"test": "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet"}

  def convert(self, row: dict[str, Any], index: int) -> dict[str, Any]:
    answer = ",".join(row["final_answer"])
    return {"id": f"olympiadbench/{row['id']}", "problem": row["question"], "answer": _text(answer)}


class Aime24(HubProblems):
  """AIME 2024 I and II."""

  REPO: ClassVar[str] = "HuggingFaceH4/aime_2024"
  FILES: ClassVar[dict[str, str]] = {"test": "data/train-00000-of-00001.parquet"}

  def convert(self, row: dict[str, Any], index: int) -> dict[str, Any]:
    return {"id": f"aime24/{row['id']}", "problem": row["problem"], "answer": _integer(row["answer"])}


class Aime25(HubProblems):
  """AIME 2025 I and II."""

  REPO: ClassVar[str] = "math-ai/aime25"
  FILES: ClassVar[dict[str, str]] = {"test": "test.jsonl"}

  def convert(self, row: dict[str, Any], index: int) -> dict[str, Any]:
    return {"id": f"aime25/{row['id']}", "problem": row["problem"], "answer": _integer(row["answer"])}


class Amc(HubProblems):
  """AMC 12 of 2022 and 2023: the 83 problems with a number as answer."""

  REPO: ClassVar[str] = "AI-MO/aimo-validation-amc"
  FILES: ClassVar[dict[str, str]] = {"test": "data/train-00000-of-00001.parquet"}

  def convert(self, row: dict[str, Any], index: int) -> dict[str, Any]:
    return {"id": f"amc/{row['id']}", "problem": row["problem"], "answer": _text(row["answer"])}


class Minerva(HubProblems):
  """Minerva: 272 problems of undergraduate mathematics and science."""

  REPO: ClassVar[str] = "math-ai/minervamath"
  FILES: ClassVar[dict[str, str]] = {"test": "test.jsonl"}

  def convert(self, row: dict[str, Any], index: int) -> dict[str, Any]:
    return {"id": f"minerva/{index}", "problem": row["question"], "answer": _text(row["answer"])}


class GpqaDiamond(HubProblems):
  """GPQA-Diamond: 198 multiple-choice questions; its authors ask not to publish any of them."""

  REPO: ClassVar[str] = "Idavidrein/gpqa"
  FILES: ClassVar[dict[str, str]] = {"test": "gpqa_diamond.csv"}
  GATED: ClassVar[bool] = True

  def convert(self, row: dict[str, Any], index: int) -> dict[str, Any]:
    made = choices.from_gpqa(row, f"{self.FILES['test']}, row {index + 1}")
    return {"id": made.id, "problem": made.problem, "answer": made.answer, "answers": list(made.answers)}


def _text(answer: Any) -> str:
  """The answer as text; sources that hold numbers write whole ones with '.0'."""
  if isinstance(answer, float) and answer.is_integer():
    answer = int(answer)
  return str(answer).strip()


def _integer(answer: Any) -> str:
  """An AIME answer without leading zeros ('033' is 33)."""
  return str(int(float(answer)))
