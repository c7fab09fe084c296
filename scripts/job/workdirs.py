# SPDX-License-Identifier: Apache-2.0
"""Locks the workdir of a run, and records the config that it ran with."""

from collections.abc import Iterator, Mapping
import contextlib
import fcntl
import json
import os
import pathlib
from typing import Any

from absl import logging

from atlas_jax import errors, types

_CONFIG = "config.json"
_LOCK = "lock"
_MAX_LISTED = 12


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Creates and locks a workdir; the lock is released when the process exits.

  Raises:
    errors.ConfigError: if it is not writable, or another process holds it.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / _LOCK).open("a+", encoding="utf-8")
  except OSError as error:
    raise errors.ConfigError(
      "The workdir is not writable.",
      where=f"--workdir={workdir}",
      why=str(error),
      fix="Choose a folder that you have permission to write to.",
    ) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise errors.ConfigError(
        "Another run uses this workdir.",
        where=f"--workdir={workdir}",
        why=f"It is held by {file.read().strip() or 'another process'}.",
        fix="Wait for that run, stop it, or choose another --workdir.",
      ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    yield


def write_config(
  workdir: pathlib.Path,
  config: types.Config,
) -> None:
  """Writes the resolved config; renames a different one from an earlier run.

  Logs the differences, since a changed learning rate in a resumed run may be a
  mistake.
  """
  path = workdir / _CONFIG
  text = config.to_json_best_effort(indent=2) + "\n"
  if path.exists() and path.read_text("utf-8") != text:
    before = _flatten(json.loads(path.read_text("utf-8")))
    _log_changes(before, _flatten(json.loads(text)))
    number = len(list(workdir.glob("config.*.json")))
    path.rename(workdir / f"config.{number}.json")
  path.write_text(text, encoding="utf-8")


def facts(workdir: pathlib.Path) -> dict[str, str]:
  """Returns the path of a workdir and the process that holds its lock."""
  path = workdir / _LOCK
  holder = path.read_text("utf-8") if path.exists() else "nobody"
  return {"workdir": str(workdir.resolve()), "held by": holder.strip()}


def flat(
  config: types.Config,
) -> dict[str, str]:
  """Returns every value of a config as JSON, by dotted key."""
  return _flatten(json.loads(config.to_json_best_effort()))


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
  values: dict[str, str] = {}
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      values |= _flatten(value, f"{prefix}{key}.")
    else:
      values[f"{prefix}{key}"] = json.dumps(value)
  return values


def _log_changes(before: Mapping[str, str], now: Mapping[str, str]) -> None:
  changed = [
    f"\n    {key}: {before.get(key, 'unset')} -> {now.get(key, 'unset')}"
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key)
  ]
  more = len(changed) - _MAX_LISTED
  logging.warning(
    "The config differs from that of the last run in this workdir:%s%s",
    "".join(changed[:_MAX_LISTED]),
    f"\n    and {more} more" if more > 0 else "",
  )
