# SPDX-License-Identifier: Apache-2.0
"""Evaluates a teacher, or a model alone, on a dataset, with resume.

Graded records are appended to a JSONL file after each batch. Its first line
holds the settings: a run with the same settings continues the file, a run with
other settings is rejected.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

from absl import logging

from atlas_jax import errors, types
from atlas_jax.evaluation import sampling
from atlas_jax.rewards import grading
from atlas_jax.teaching import missing, single_model
from atlas_jax.teaching import protocol as teaching_protocol


def run(  # noqa: PLR0913 - one argument per collaborator.
  protocol: teaching_protocol.Protocol | single_model.SingleModelRollouts,
  questions: Sequence[types.Question],
  *,
  grader: grading.Grader,
  batch_size: int,
  seed: int,
  weights: Mapping[str, str],
  path: pathlib.Path,
  should_stop: Callable[[], bool],
  from_first: types.OnFirstProcess,
) -> list[types.TeachingRecord]:
  """Runs the protocol on every question and writes the graded records.

  Args:
    protocol: samples the records.
    questions: with distinct row ids; their paraphrases are answered too.
    grader: grades the answers.
    batch_size: questions per pass; affects only speed and memory.
    seed: of probes, teachings and taught answers; see `sampling.sample`.
    weights: identifies the samplers' weights, e.g. {"policy": checkpoint}; part
      of the settings, so different teachers cannot share a file.
    path: the JSONL file. Missing folders are created.
    should_stop: called before each pass.
    from_first: runs file access in the first of several processes.

  Returns:
    All records in question order, including those read from the file.

  Raises:
    ConfigError: if the file has records of other settings.
    DataError: if a line of the file is invalid, or row ids repeat.
    RolloutError: if a sampler dropped a prompt; earlier batches are saved.
    PreemptedError: if `should_stop` returned True; finished batches are saved.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
  _check_distinct(questions)
  header = {
    "questions": _digest([dataclasses.asdict(q) for q in questions]),
    "seed": seed,
    "weights": dict(weights),
    "math_verify": grader.verify is not None,
    **_settings(protocol),
  }
  header = {"digest": _digest(header), "settings": header}
  group_size = header["settings"]["teach"]["group_size"]
  found = from_first(lambda: _resume(path, header, group_size))
  records = [
    _parse(path, i, line.encode("latin-1")) for i, line in enumerate(found, 2)
  ]
  done = len(records) // group_size
  if done:
    logging.info(
      "Resuming evaluation: %s of %s questions in %s",
      done,
      len(questions),
      path,
    )
  for start in range(done, len(questions), batch_size):
    if should_stop():
      raise errors.PreemptedError(
        f"Stopped on request after {start} of {len(questions)} questions.",
        where=str(path),
        why="The process received a stop signal; the records are saved.",
        fix="Run the same command again to continue with the next question.",
      )
    batch = questions[start : start + batch_size]
    sampled = sampling.sample(protocol, batch, seed)
    # Raises if a question was dropped: the next run samples this batch again.
    missing.fraction(batch, sampled, max_fraction=0.0)
    graded = grader.grade(sampled)
    lines = [types.to_json_line(record) for record in graded]
    from_first(functools.partial(_append, path, lines))
    records += graded
    logging.info(
      "Evaluated %s of %s questions to %s",
      min(start + batch_size, len(questions)),
      len(questions),
      path,
    )
  return records


def read(path: pathlib.Path) -> list[types.TeachingRecord]:
  """Reads the records that `run` wrote.

  Raises:
    DataError: if the file is missing, or a line is invalid, with its number.
  """
  try:
    lines = path.read_bytes().splitlines()
  except OSError as error:
    raise errors.DataError(
      "No records of an evaluation were found.",
      where=str(path),
      why=str(error),
      fix="Pass the --workdir of a finished scripts.evaluate.",
    ) from error
  return [
    _parse(path, number, line) for number, line in enumerate(lines[1:], start=2)
  ]


def _check_distinct(questions: Sequence[types.Question]) -> None:
  """Raises if row ids repeat."""
  seen: set[str] = set()
  for question in questions:
    if question.row_id in seen:
      raise errors.DataError(
        f"Row ids must be unique, got {question.row_id!r} twice.",
        where=f"row {question.row_id!r}",
        why="Records and random numbers are identified by row id.",
        fix="Set a unique id for each row, or no ids to number the rows.",
      )
    seen.add(question.row_id)


def _settings(
  protocol: teaching_protocol.Protocol | single_model.SingleModelRollouts,
) -> dict[str, Any]:  # Any: JSON.
  """Returns the settings of the rollouts that determine the records."""
  settings: dict[str, Any] = {
    "versions": {
      name: role.sampler.version for name, role in protocol.roles.items()
    },
    # An example shows the arguments of the chat template, such as thinking.
    "roles": {
      name: [
        role.max_prompt_tokens,
        role.max_thinking_tokens,
        role.prompt("", "Example").text,
      ]
      for name, role in protocol.roles.items()
    },
  }
  if isinstance(protocol, single_model.SingleModelRollouts):
    settings["template"] = protocol.template
    phases = {"teach": protocol.answer_params}
  else:
    settings["templates"] = dataclasses.asdict(protocol.templates)
    settings["baseline"] = dataclasses.asdict(protocol.baseline_params)
    phases = {
      "probe": protocol.probe_params,
      "teach": protocol.teach_params,
      "solve": protocol.solve_params,
    }
  for name, params in phases.items():
    settings[name] = dataclasses.asdict(params)
    del settings[name]["seed"]  # The run's seed replaces it.
  return settings


def _digest(value: Any) -> str:  # Any: JSON.
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _resume(
  path: pathlib.Path,
  header: Mapping[str, Any],  # Any: JSON.
  group_size: int,
) -> list[str]:
  """Returns the lines of finished questions; truncates the file after them.

  Writes the header of a new file. A line that a crash left incomplete, and a
  question with fewer than `group_size` records, are removed.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  raw = path.read_bytes() if path.exists() else b""
  lines = raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True)
  header_line = json.dumps(header)
  # A crash may leave a prefix of the header; other content is not ours.
  if lines or not header_line.encode().startswith(raw):
    _check_header(path, (lines or [raw])[0], header)
    finished = (len(lines) - 1) // group_size * group_size
    lines = lines[: 1 + finished]
  if sum(map(len, lines)) < len(raw):
    os.truncate(path, sum(map(len, lines)))
  if not lines:
    _append(path, [header_line])
  # Latin-1 maps bytes to str one to one, for the JSON broadcast.
  return [line.decode("latin-1") for line in lines[1:]]


def _check_header(
  path: pathlib.Path,
  line: bytes,
  header: Mapping[str, Any],  # Any: JSON.
) -> None:
  """Raises if the file has other settings."""
  try:
    found = json.loads(line)
  except ValueError:
    found = None
  if not isinstance(found, dict) or "digest" not in found:
    problem = "Its first line is not an evaluation header."
  elif found["digest"] != header["digest"]:
    old, new = found.get("settings", {}), header["settings"]
    names = sorted(name for name in new if old.get(name) != new[name])
    problem = f"These settings differ: {', '.join(names)}."
  else:
    return
  raise errors.ConfigError(
    "The records file belongs to another evaluation.",
    where=str(path),
    why=problem,
    fix="Choose another file, or delete this one to start over.",
  )


def _append(path: pathlib.Path, lines: Sequence[str]) -> None:
  """Appends lines and syncs the file to disk."""
  with path.open("a", encoding="utf-8", newline="\n") as file:
    file.write("".join(f"{line}\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())


def _parse(
  path: pathlib.Path, number: int, line: bytes
) -> types.TeachingRecord:
  """Parses one record."""
  try:
    return types.teaching_record(json.loads(line))
  except (ValueError, TypeError, KeyError) as error:
    raise errors.DataError(
      f"Line {number} is not a valid teaching record.",
      where=f"{path}:{number}",
      why=f"{type(error).__name__}: {error}",
      fix="Delete the file and evaluate again.",
    ) from error
