# SPDX-License-Identifier: Apache-2.0
"""Errors with four parts (what, where, why, fix) and an exit code.

Exit codes let a scheduler distinguish, for example, an invalid flag from a lost
server.
"""

import enum


class Exit(enum.IntEnum):
  """Exit codes of all scripts."""

  DONE = 0
  CONFIG = 2
  DATA = 3
  DIVERGED = 4
  CHECKPOINT = 5
  ROLLOUT = 6
  JUDGE = 7
  LOST_PROCESS = 8
  INTERNAL = 70
  PREEMPTED = 75
  HANG = 124


class AtlasError(Exception):
  """A failure with a known cause.

  Subclasses set the exit code. `what` is one sentence, `where` names the file,
  row, tensor or flag, `why` is the likely cause, `fix` is the action to take.
  """

  exit_code = Exit.INTERNAL

  def __init__(self, what: str, *, where: str, why: str, fix: str) -> None:
    self.what, self.where, self.why, self.fix = what, where, why, fix
    super().__init__(
      f"{what}\n  where: {where}\n  why  : {why}\n  fix  : {fix}"
    )


class ConfigError(AtlasError):
  """An invalid flag or config value."""

  exit_code = Exit.CONFIG


class DataError(AtlasError):
  """An invalid data file."""

  exit_code = Exit.DATA


class DivergedError(AtlasError):
  """Training diverged, or never updated the parameters."""

  exit_code = Exit.DIVERGED


class CheckpointError(AtlasError):
  """Weights or training state cannot be loaded or written."""

  exit_code = Exit.CHECKPOINT


class RolloutError(AtlasError):
  """A rollout server is unreachable or fails."""

  exit_code = Exit.ROLLOUT


class LostProcessError(AtlasError):
  """A process of a multi-process run exited or never connected."""

  exit_code = Exit.LOST_PROCESS


class PreemptedError(AtlasError):
  """The run stopped on request and saved its state."""

  exit_code = Exit.PREEMPTED


class OutOfMemoryError(AtlasError):
  """A device or the host is out of memory."""
