# SPDX-License-Identifier: Apache-2.0
"""A run's folder: it belongs to one process, and says what it ran with."""

from collections.abc import Iterator, Mapping
import contextlib
import fcntl
import json
import os
import pathlib
from typing import Any

from absl import logging

from atlas_jax import errors

_CONFIG = "config.json"
_LOCK = "lock"
_MAX_LISTED = 12


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Holds a folder, which it makes; the lock dies with the process.

  Raises:
    errors.ConfigError: if it cannot be written, or another process holds it.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / _LOCK).open("a+", encoding="utf-8")
  except OSError as error:
    raise errors.ConfigError(
      "The workdir cannot be written.",
      where=f"--workdir={workdir}",
      why=str(error),
      fix="Choose a folder that you may write to.",
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
  config: Any,  # Any: a ConfigDict, whose values have no static type.
) -> None:
  """Writes the resolved config; another that it replaces stays beside it.

  How they differ is logged: a run that goes on with another learning rate does
  what its user wants, or what he never noticed.
  """
  path = workdir / _CONFIG
  text = config.to_json_best_effort(indent=2) + "\n"
  if path.exists() and path.read_text("utf-8") != text:
    before = _flat(json.loads(path.read_text("utf-8")))
    _tell_changes(before, _flat(json.loads(text)))
    number = len(list(workdir.glob("config.*.json")))
    path.rename(workdir / f"config.{number}.json")
  path.write_text(text, encoding="utf-8")


def facts(workdir: pathlib.Path) -> dict[str, str]:
  """Tells which folder it is, and who holds it."""
  path = workdir / _LOCK
  holder = path.read_text("utf-8") if path.exists() else "nobody"
  return {"workdir": str(workdir.resolve()), "held by": holder.strip()}


def flat(
  config: Any,  # Any: as in `write_config`.
) -> dict[str, str]:
  """Names every value of a config by its dotted key."""
  return _flat(json.loads(config.to_json_best_effort()))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
  """Names every value by its dotted key."""
  values: dict[str, str] = {}
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      values |= _flat(value, f"{prefix}{key}.")
    else:
      values[f"{prefix}{key}"] = json.dumps(value)
  return values


def _tell_changes(before: Mapping[str, str], now: Mapping[str, str]) -> None:
  changed = [
    f"\n    {key}: {before.get(key, 'none')} then, {now.get(key, 'none')} now"
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key)
  ]
  more = len(changed) - _MAX_LISTED
  logging.warning(
    "The config is not that of the last run in this workdir:%s%s",
    "".join(changed[:_MAX_LISTED]),
    f"\n    and {more} more" if more > 0 else "",
  )
