# SPDX-License-Identifier: Apache-2.0
"""Estimates the time of sampling from memory bandwidth and peak FLOP/s.

A decoding step reads the weights and the keys and values of its rows from
memory, and computes 2 N FLOPs per row. Both overlap, so the slower one counts.

Source: Pope et al., arXiv:2211.05102, section 2.
"""

from collections.abc import Iterator
import dataclasses

import jax.numpy as jnp

from atlas_jax import types
from atlas_jax.models import decoder
from atlas_jax.train.telemetry import flops
from conversion import load
from scripts.plan import memory, update_bytes

_CACHED = "baseline"  # Sampled once for each question.


@dataclasses.dataclass(frozen=True)
class Device:
  """What limits one device: bytes per second, and FLOP/s."""

  bandwidth: float
  peak_flops: float


@dataclasses.dataclass(frozen=True)
class Phase:
  """The completions of one phase of a step.

  Attributes:
    name: key of the section `sampling`.
    num_rows: completions.
    prompt_tokens: of the longest prompt.
    new_tokens: the most tokens of a completion.
  """

  name: str
  num_rows: int
  prompt_tokens: int
  new_tokens: int

  @property
  def is_cached(self) -> bool:
    """Whether later steps sample only what is new."""
    return self.name == _CACHED


def seconds(
  described: memory.RunShapes,
  config: types.Config,
  device: Device,
  *,
  prompt_tokens: int,
) -> dict[Phase, float]:
  """Estimates the seconds of each phase if all completions are longest.

  Sampling in the trainer uses all of its devices, without the time to gather
  sharded weights. Servers are assumed to have one such device each.
  """
  is_local = config.rollout.backend == "jax"
  found = {}
  for phase in _phases(config, prompt_tokens):
    is_policy = phase.name in ("teach", "complete")
    section = config.model if is_policy else config.student
    model = (
      described.policy.base
      if is_policy
      else memory.frozen(described.mesh, section)
    )
    urls = "policy_urls" if is_policy else "student_urls"
    num_servers = max(1, len(config.rollout[urls]))
    found[phase] = of_phase(
      phase,
      model,
      section.dtype if is_local else config.rollout.dtype,
      device,
      num_devices=described.mesh.size if is_local else num_servers,
      num_shards=described.mesh.shape["tensor"] if is_local else 1,
      max_rows=config.sampler.max_rows if is_local else phase.num_rows,
    )
  if config.recipe == "gkd":  # Other steps take completions of the data.
    share = config.completions.on_policy_fraction
    return {phase: share * s for phase, s in found.items()}
  return found


def of_phase(
  phase: Phase,
  model: decoder.Model,
  dtype: str,
  device: Device,
  *,
  num_devices: int,
  num_shards: int,
  max_rows: int,
) -> float:
  """Estimates the seconds of one phase.

  Args:
    phase: its rows and lengths.
    model: the model that samples.
    dtype: of its weights.
    device: what limits a device.
    num_devices: that share the rows, or the weights.
    num_shards: devices that hold a part of the weights each.
    max_rows: completions decoded at once, over all devices.
  """
  shape = model.config
  num_batches = -(-phase.num_rows // max_rows)
  rows = phase.num_rows / num_batches / num_devices  # On a device.
  length = phase.prompt_tokens + phase.new_tokens // 2  # On average.
  weights = update_bytes.num_global_bytes(load.describe(model, dtype))
  # A key and a value for each layer and head.
  cache = 2 * shape.num_layers * shape.num_kv_heads * shape.head_width * length
  cache *= jnp.dtype(dtype).itemsize
  read = weights / num_shards + rows * cache
  computed = rows * flops.of_forward(shape, [length]) / length
  step = max(read / device.bandwidth, computed / device.peak_flops)
  return num_batches * phase.new_tokens * step


def _phases(config: types.Config, prompt_tokens: int) -> Iterator[Phase]:
  """Yields the phases that a recipe samples in a step."""
  sampling = config.sampling
  if config.recipe == "gkd":
    complete = sampling.complete
    yield Phase(
      "complete",
      config.batch.num_prompts * complete.group_size,
      prompt_tokens,
      complete.max_completion_tokens,
    )
    return
  num_questions, teach = config.batch.num_questions, sampling.teach
  teachings = num_questions * teach.group_size
  probe_tokens = 0
  if "student" in config:
    thinking = config.roles.student.max_thinking_tokens
    probe, baseline, solve = sampling.probe, sampling.baseline, sampling.solve
    probe_tokens = probe.max_completion_tokens
    taught = prompt_tokens + teach.max_completion_tokens
    new = thinking + solve.max_completion_tokens
    yield Phase("probe", num_questions, prompt_tokens, thinking + probe_tokens)
    yield Phase("solve", teachings * solve.group_size, taught, new)
    yield Phase(
      _CACHED,
      num_questions * baseline.group_size,
      prompt_tokens,
      thinking + baseline.max_completion_tokens,
    )
  yield Phase(
    "teach",
    teachings,
    prompt_tokens + probe_tokens,
    teach.max_completion_tokens,
  )
