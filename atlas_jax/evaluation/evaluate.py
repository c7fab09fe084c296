# SPDX-License-Identifier: Apache-2.0
"""Runs the teaching protocol over a data set, and can be interrupted.

Records are graded and appended to a JSONL file batch by batch. Its first line
holds the settings they came from; the same line of command carries on where
the file ends, and other settings are refused.
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
from atlas_jax.rewards import teaching as rewards
from atlas_jax.teaching import protocol as teaching_protocol


def run(
  protocol: teaching_protocol.Protocol,
  questions: Sequence[types.Question],
  *,
  batch_size: int,
  seed: int,
  weights: Mapping[str, str],
  path: pathlib.Path,
  should_stop: Callable[[], bool],
  from_first: types.OnFirstProcess,
) -> list[types.TeachingRecord]:
  """Teaches every question, and writes and returns the graded records.

  Args:
    protocol: what samples. For a paired comparison its baselines' seed is
      `seed`.
    questions: with distinct row ids.
    batch_size: questions per pass; decides speed and memory alone.
    seed: of probes, teachings and taught answers.
    weights: names what the samplers hold, such as {"policy": checkpoint}, so
      that records of one teacher are never taken for those of another.
    path: the JSONL file. Missing folders are made.
    should_stop: asked before each pass.
    from_first: of several processes that evaluate as one, the first reads and
      writes the file.

  Returns:
    All records, question by question, those read back included.

  Raises:
    ConfigError: if the file holds records of other settings.
    DataError: if a line of it cannot be read, or row ids repeat.
    RolloutError: if a sampler gave up a prompt; the batches before are in the
      file.
    PreemptedError: if `should_stop` said so; what is done is in the file.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
  _check_distinct(questions)
  group_size = protocol.teach_params.group_size
  header = _header(protocol, questions, seed=seed, weights=weights)
  found = from_first(lambda: _resume(path, header, group_size))
  records = [
    _parse(path, i, line.encode("latin-1")) for i, line in enumerate(found, 2)
  ]
  done = len(records) // group_size
  if done:
    logging.info("%s: %s of %s questions found", path, done, len(questions))
  for start in range(done, len(questions), batch_size):
    if should_stop():
      raise errors.PreemptedError(
        f"Stopped on request after {start} of {len(questions)} questions.",
        where=str(path),
        why="The process was asked to stop; the records are saved.",
        fix="Run the same command again: it goes on with the next question.",
      )
    asked = questions[start : start + batch_size]
    batch = protocol.run(asked, seed)
    # What is missing can be had later: the next run goes on from here.
    teaching_protocol.dropped_fraction(asked, batch, max_fraction=0.0)
    graded = [rewards.grade(record) for record in batch]
    lines = [types.to_json_line(record) for record in graded]
    from_first(functools.partial(_append, path, lines))
    records += graded
    logging.info(
      "%s: %s of %s questions",
      path,
      min(start + batch_size, len(questions)),
      len(questions),
    )
  return records


def read(path: pathlib.Path) -> list[types.TeachingRecord]:
  """Reads back what `run` wrote.

  Raises:
    DataError: if a line cannot be read; with its number.
  """
  lines = path.read_bytes().splitlines()
  return [
    _parse(path, number, line) for number, line in enumerate(lines[1:], start=2)
  ]


def _check_distinct(questions: Sequence[types.Question]) -> None:
  """Refuses questions that the records could not tell apart."""
  seen: set[str] = set()
  for question in questions:
    if question.row_id in seen:
      raise errors.DataError(
        f"Two questions have the row id {question.row_id!r}.",
        where=f"row {question.row_id!r}",
        why="Records and random numbers are told apart by row id.",
        fix="Give each row its own id, or none to number them.",
      )
    seen.add(question.row_id)


def _header(
  protocol: teaching_protocol.Protocol,
  questions: Sequence[types.Question],
  *,
  seed: int,
  weights: Mapping[str, str],
) -> dict[str, Any]:  # Any: JSON.
  """Describes what decides the records, with a digest of it."""
  settings = {
    "questions": _digest([dataclasses.asdict(q) for q in questions]),
    "seed": seed,
    "weights": dict(weights),
    "versions": {
      "policy": protocol.policy.sampler.version,
      "student": protocol.student.sampler.version,
    },
    "templates": dataclasses.asdict(protocol.templates),
    "probe": dataclasses.asdict(protocol.probe_params),
    "teach": dataclasses.asdict(protocol.teach_params),
    "solve": dataclasses.asdict(protocol.solve_params),
    "baseline": dataclasses.asdict(protocol.baseline_params),
  }
  # The run's seed stands in for theirs.
  for phase in ("probe", "teach", "solve"):
    del settings[phase]["seed"]
  return {"digest": _digest(settings), "settings": settings}


def _digest(value: Any) -> str:  # Any: JSON.
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _resume(
  path: pathlib.Path,
  header: Mapping[str, Any],  # Any: JSON.
  group_size: int,
) -> list[str]:
  """Finds the finished questions and cuts off what a crash left half-written.

  A new file gets its header.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  raw = path.read_bytes() if path.exists() else b""
  lines = raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True)
  header_line = json.dumps(header)
  # A crash may leave a part of the header; anything else is another's file.
  if lines or not header_line.encode().startswith(raw):
    _check_header(path, (lines or [raw])[0], header)
    finished = (len(lines) - 1) // group_size * group_size
    lines = lines[: 1 + finished]
  if sum(map(len, lines)) < len(raw):
    os.truncate(path, sum(map(len, lines)))
  if not lines:
    _append(path, [header_line])
  return [line.decode("latin-1") for line in lines[1:]]  # JSON has no bytes.


def _check_header(
  path: pathlib.Path,
  line: bytes,
  header: Mapping[str, Any],  # Any: JSON.
) -> None:
  """Refuses a file that was begun with other settings."""
  try:
    found = json.loads(line)
  except ValueError:
    found = None
  if not isinstance(found, dict) or "digest" not in found:
    problem = "Its first line is not the header of an evaluation."
  elif found["digest"] != header["digest"]:
    old, new = found.get("settings", {}), header["settings"]
    names = sorted(name for name in new if old.get(name) != new[name])
    problem = f"These differ: {', '.join(names)}."
  else:
    return
  raise errors.ConfigError(
    "The records' file is not of this evaluation.",
    where=str(path),
    why=problem,
    fix="Name another file, or delete this one to start again.",
  )


def _append(path: pathlib.Path, lines: Sequence[str]) -> None:
  """Appends whole lines and waits until they are on the disk."""
  with path.open("a", encoding="utf-8", newline="\n") as file:
    file.write("".join(f"{line}\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())


def _parse(
  path: pathlib.Path, number: int, line: bytes
) -> types.TeachingRecord:
  """Reads one record back."""
  try:
    return types.teaching_record(json.loads(line))
  except (ValueError, TypeError, KeyError) as error:
    raise errors.DataError(
      f"Line {number} is not a teaching record.",
      where=f"{path}:{number}",
      why=f"{type(error).__name__}: {error}",
      fix="Delete the file to evaluate again.",
    ) from error
