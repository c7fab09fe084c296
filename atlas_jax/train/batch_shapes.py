# SPDX-License-Identifier: Apache-2.0
"""The shapes of the batches of a run, chosen from the config only.

So a run compiles at most one program per shape, whatever the lengths of its
sequences. Rows have T tokens, one of L, 2 L, 4 L, ... up to the length of the
longest possible sequence; a batch has the smallest T that holds its longest
sequence. The longer the rows, the fewer are in a microbatch, which bounds the
memory. There are enough microbatches for one sequence per row; those without
any are not computed.
"""

import dataclasses
import functools
from typing import NamedTuple

from absl import logging
import jax

from atlas_jax import errors, sharding, types

_LENGTH_MULTIPLE = 32


class Shape(NamedTuple):
  """M microbatches (`num_microbatches`) of R rows of T tokens (`length`)."""

  length: int
  num_rows: int
  num_microbatches: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """The shapes of the batches of a run.

  Attributes:
    length: tokens of the shortest rows (L); rounded up to a multiple of 32.
    packed: whether a row may hold several sequences.
    per_device: rows of L tokens per device and microbatch, fewer if they are
      longer but at least 1; 0 for a single microbatch.
    num_minibatches: batches that the sequences of a step are split into.
    num_shards: number of devices with different rows.
    max_sequences: upper bound on the sequences of a step.
    max_length: upper bound on the tokens of a sequence.
  """

  length: int
  packed: bool
  per_device: int
  num_minibatches: int
  num_shards: int
  max_sequences: int
  max_length: int

  def __post_init__(self) -> None:
    """Validates the settings.

    Raises:
      errors.ConfigError: if a count is too small.
    """
    for name, value, least in (
      ("batch.per_device", self.per_device, 0),
      ("batch.num_minibatches", self.num_minibatches, 1),
      ("packing.length", self.length, 0),
    ):
      if value < least:
        raise errors.ConfigError(
          f"Invalid batch layout: {name} must be >= {least}, got {value}.",
          where=f"--config.{name}={value}",
          why="It is a count.",
          fix=f"Set it to {least} or more.",
        )

  @functools.cached_property
  def menu(self) -> tuple[Shape, ...]:
    """The shapes, by increasing length."""
    lengths = [round_length(max(self.length, 1))]
    longest = round_length(self.max_length)
    while lengths[-1] < longest:
      lengths.append(min(2 * lengths[-1], longest))
    # A row per sequence, on each device.
    most = self.num_completions // self.num_shards
    menu = []
    for length in lengths:
      num_rows = max(1, self.per_device * lengths[0] // length)
      num_rows = min(most, num_rows) if self.per_device else most
      num_microbatches = -(-most // num_rows)
      menu.append(Shape(length, num_rows * self.num_shards, num_microbatches))
    return tuple(menu)

  def log(self) -> None:
    """Logs the menu."""
    logging.info(
      "Batches have one of %d shapes, microbatches x rows x tokens: %s.",
      len(self.menu),
      ", ".join(f"{m} x {r} x {t}" for t, r, m in self.menu),
    )

  @property
  def num_completions(self) -> int:
    """B, completions of a batch: all that fit, rounded up to the shards."""
    most = -(-self.max_sequences // self.num_minibatches)
    return _round_up(most, self.num_shards)


def of_grpo(
  config: types.Config, mesh: jax.sharding.Mesh, *, max_positions: int
) -> Layout:
  """Returns the shapes of GRPO's batches; refills replace, and add nothing.

  Args:
    config: sections `batch`, `packing`, `sampling` and `roles`.
    mesh: see `sharding.make_mesh`.
    max_positions: of the policy; bounds the longest sequence.
  """
  batch, teach = config.batch, config.sampling.teach
  longest = config.roles.policy.max_prompt_tokens
  if longest:
    longest = min(longest + teach.max_completion_tokens, max_positions)
  return Layout(
    **config.packing,
    per_device=batch.per_device,
    num_minibatches=batch.num_minibatches,
    num_shards=sharding.num_row_shards(mesh),
    max_sequences=batch.num_questions * teach.group_size,
    max_length=longest or max_positions,
  )


def of_gkd(config: types.Config, mesh: jax.sharding.Mesh) -> Layout:
  """Returns the shape of GKD's batches: `packing.length` bounds a sequence."""
  packing, complete = config.packing, config.sampling.complete
  return Layout(
    length=packing.length,
    packed=packing.packed,
    per_device=config.batch.per_device,
    num_minibatches=1,
    num_shards=sharding.num_row_shards(mesh),
    max_sequences=config.batch.num_prompts * complete.group_size,
    max_length=packing.length,
  )


def round_length(length: int) -> int:
  """Rounds up to a multiple of 32, to limit the number of compiled shapes."""
  return _round_up(length, _LENGTH_MULTIPLE)


def _round_up(count: int, multiple: int) -> int:
  return -(-count // multiple) * multiple
