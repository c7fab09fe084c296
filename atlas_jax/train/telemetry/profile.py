# SPDX-License-Identifier: Apache-2.0
"""Traces a few steps of a run, to see what its devices do."""

import pathlib
import re

from absl import logging
import jax

from atlas_jax import errors


def parse(steps: str, num_steps: int) -> range:
  """Reads "a:b" as the steps from a to b, both included; "" is none.

  Raises:
    errors.ConfigError: if these are no steps of the run.
  """
  if not steps:
    return range(0)
  match = re.fullmatch(r"(\d+):(\d+)", steps)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last <= num_steps:
    raise errors.ConfigError(
      f"No steps can be profiled between {steps}.",
      where=f"--config.loop.profile_steps={steps}",
      why=f"They are a first and a last step of 1 to {num_steps}.",
      fix="Set it to 3:5, for example; the first steps still compile.",
    )
  return range(first, last + 1)


class Profile:
  """A trace of some steps, which `xprof`, TensorBoard and Perfetto can open."""

  def __init__(self, steps: range, workdir: pathlib.Path) -> None:
    """Traces nothing yet; the trace goes to `profile/` in the workdir."""
    self._steps, self._directory = steps, workdir / "profile"
    self._is_tracing = False

  def __enter__(self) -> "Profile":
    """Waits for the first of the steps."""
    return self

  def __exit__(self, *error: object) -> None:
    """Ends the trace of a run that ended before the last of them."""
    self._stop()

  def before(self, step: int, queued: object) -> None:
    """Begins the trace before its first step, and ends it after its last.

    Devices may still be at work for the step before, on what is `queued`.
    """
    if self._is_tracing and step not in self._steps:
      jax.block_until_ready(queued)
      self._stop()
    elif step in self._steps and not self._is_tracing:
      jax.profiler.start_trace(self._directory)
      self._is_tracing = True

  def _stop(self) -> None:
    if self._is_tracing:
      self._is_tracing = False
      jax.profiler.stop_trace()
      logging.info("The profile of steps is in %s.", self._directory)
