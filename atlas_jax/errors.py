# SPDX-License-Identifier: Apache-2.0
"""What a user is told when something stops: what, where, why, fix.

Every error has an exit code, so that a scheduler can tell a bad flag from a
lost server, and an id under which the documentation explains it.
"""

import enum


class Exit(enum.IntEnum):
  """Exit codes of every script."""

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
  """A failure with a known cause, told in four parts.

  Subclasses set the exit code; `what` is one sentence, `where` names the file,
  row, tensor or flag, `why` the likely cause, `fix` what to do next.
  """

  exit_code = Exit.INTERNAL

  def __init__(self, what: str, *, where: str, why: str, fix: str) -> None:
    self.what, self.where, self.why, self.fix = what, where, why, fix
    super().__init__(
      f"{what}\n  where: {where}\n  why  : {why}\n  fix  : {fix}"
    )


class ConfigError(AtlasError):
  """A flag or a config value that cannot be honoured."""

  exit_code = Exit.CONFIG


class DataError(AtlasError):
  """A data file that cannot be used."""

  exit_code = Exit.DATA


class DivergedError(AtlasError):
  """Training produced numbers that are not finite."""

  exit_code = Exit.DIVERGED


class CheckpointError(AtlasError):
  """Weights or training state that cannot be loaded or written."""

  exit_code = Exit.CHECKPOINT


class RolloutError(AtlasError):
  """A rollout server that cannot be reached, or does not do its work."""

  exit_code = Exit.ROLLOUT


class LostProcessError(AtlasError):
  """One of several processes that train as one is gone, or never came."""

  exit_code = Exit.LOST_PROCESS


class PreemptedError(AtlasError):
  """Stopped on request, with the state saved."""

  exit_code = Exit.PREEMPTED


class OutOfMemoryError(AtlasError):
  """A device, or the host, that has no room left."""
