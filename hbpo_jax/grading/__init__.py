"""Grading: the text of a response and the true answer -> a verdict. Host only; never imports JAX."""

from hbpo_jax.grading.custom import CustomGrader, load_custom
from hbpo_jax.grading.journal import Journal, StepGrading, grade_step
from hbpo_jax.grading.pool import Grader, grade
from hbpo_jax.grading.verdict import Verdict

__all__ = ["CustomGrader", "Grader", "Journal", "StepGrading", "Verdict", "grade", "grade_step", "load_custom"]
