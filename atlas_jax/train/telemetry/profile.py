# SPDX-License-Identifier: Apache-2.0
"""Profiles a range of training steps with `jax.profiler`."""

import pathlib
import re

from absl import logging
import jax

from atlas_jax import errors


def parse(steps: str, num_steps: int) -> range:
  """Parses "a:b" as the steps a to b, inclusive; "" is an empty range.

  Raises:
    errors.ConfigError: unless 1 <= a <= b <= num_steps.
  """
  if not steps:
    return range(0)
  match = re.fullmatch(r"(\d+):(\d+)", steps)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last <= num_steps:
    raise errors.ConfigError(
      f"profile_steps must be FIRST:LAST, got {steps!r}.",
      where=f"--config.loop.profile_steps={steps}",
      why=f"Both must be steps of the run, from 1 to {num_steps}, in order.",
      fix="Set it to 3:5, for example; the first steps include compilation.",
    )
  return range(first, last + 1)


class Profile:
  """Writes a trace that `xprof`, TensorBoard and Perfetto can open."""

  def __init__(self, steps: range, workdir: pathlib.Path) -> None:
    """Configures a trace of `steps`, written to `profile/` in the workdir."""
    self._steps, self._directory = steps, workdir / "profile"
    self._is_tracing = False

  def __enter__(self) -> "Profile":
    """Returns the profile; tracing starts in `before`."""
    return self

  def __exit__(self, *error: object) -> None:
    """Stops a trace that is still running."""
    self._stop()

  def before(self, step: int, queued: object) -> None:
    """Starts the trace before its first step, and stops it after its last.

    Waits for `queued`, the results of the previous step, before it stops.
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
      logging.info("Wrote profile to %s.", self._directory)
