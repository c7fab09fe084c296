# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes that a recipe needs on each device; see `update_bytes`.

Models, optimizer state and samplers are described as `jax.ShapeDtypeStruct`s by
the functions that training uses, on as many simulated devices as the run has.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import optax

from atlas_jax import sharding, types
from atlas_jax.data import packing
from atlas_jax.models import decoder, decoder_config, lora, quantized
from atlas_jax.train import (
  batch_shapes,
  gkd,
  gkd_batches,
  grpo,
  train_state,
  trainable,
)
from atlas_jax.train import optimizer as train_optimizer
from conversion import load
from scripts.plan import update_bytes


@dataclasses.dataclass(frozen=True)
class RunShapes:
  """Shapes and shardings of a run; see `update_bytes.of_update`."""

  policy: trainable.Policy
  state: train_state.TrainState
  optimizer: optax.GradientTransformation
  build: update_bytes.Build
  rows: update_bytes.Rows
  mesh: jax.sharding.Mesh
  teacher: gkd.Teacher | None


@dataclasses.dataclass(frozen=True)
class Need:
  """Bytes of one device, by purpose.

  Attributes:
    resident: held all the time.
    phases: additional bytes of each phase of a step.
    on_host: offloaded to host memory, for each device.
    is_ahead: whether the next batch is sampled during the update; no other
      phases overlap.
  """

  resident: Mapping[str, int]
  phases: Mapping[str, Mapping[str, int]]
  on_host: int
  is_ahead: bool

  @property
  def peak(self) -> int:
    """The most bytes held at one time."""
    sizes = {name: sum(phase.values()) for name, phase in self.phases.items()}
    if self.is_ahead:
      sizes["update"] += sizes.get("sampling", 0)
    return sum(self.resident.values()) + max(sizes.values())


def describe(
  config: types.Config,
  shape: decoder_config.DecoderConfig,
  *,
  prompt_tokens: int,
) -> RunShapes:
  """Describes the run of a config.

  Args:
    config: of a recipe.
    shape: config of the trained model.
    prompt_tokens: tokens of the longest question, in its template.

  Raises:
    errors.AtlasError: if the config is inconsistent, or invalid for the mesh.
  """
  mesh = sharding.make_mesh(**config.mesh)
  settings = _settings(config.model)
  model = decoder.build(shape, **settings, layout=sharding.of_activations(mesh))
  params = _place(mesh, load.describe(model, config.model.param_dtype))
  adapters = {name: config.lora[name] for name in ("rank", "alpha", "targets")}
  policy, trained = trainable.split(model, params, lora.Lora(**adapters))
  trained = _place(mesh, trained) if policy.adapters else params
  optimizer = train_optimizer.make_optimizer(
    optax.constant_schedule(0.0), **config.optimizer
  )
  reference = None
  if config.recipe == "grpo" and grpo.needs_copy(policy, config):
    copy = functools.partial(train_state.copied, dtype=config.reference.dtype)
    reference = _place(mesh, jax.eval_shape(copy, trained))
  state = train_state.describe(
    trained,
    optimizer,
    mesh=mesh,
    reference=reference,
    offload=train_state.Offload(**config.offload),
  )
  return RunShapes(
    policy,
    state,
    optimizer,
    functools.partial(decoder.build, **settings),
    _rows(config, mesh, shape, prompt_tokens),
    mesh,
    _teacher(mesh, config) if config.recipe == "gkd" else None,
  )


def need(
  described: RunShapes,
  config: types.Config,
  *,
  prompt_tokens: int,
) -> Need:
  """Counts the bytes that each device needs; see `describe`."""
  update = update_bytes.of_update(
    described.policy,
    described.state,
    described.build,
    described.rows,
    mesh=described.mesh,
    teacher=described.teacher,
  )
  names = ("parameters", "frozen base", "optimizer", "reference", "teacher")
  resident = {name: update.pop(name) for name in names}
  phases = {"update": update}
  if config.recipe == "grpo":
    resident |= _students(described, config)
  if is_sampled(config):
    if config.rollout.backend == "jax":
      resident["sampler"] = _cast(
        described.policy.base, described, config.model.dtype
      )
      phases["sampling"] = {
        "KV cache": _cache(described, config, prompt_tokens=prompt_tokens)
      }
    push = _push(described, config)
    if config.lora.path:  # Merged for the sampler, and not freed.
      resident["initial weights"] = push["merged weights"]
    phases["push"] = push
  return Need(
    {name: size for name, size in resident.items() if size},
    phases,
    update_bytes.num_bytes(described.state, on_host=True),
    is_ahead=config.recipe == "grpo" and config.overlap.max_staleness > 0,
  )


def _push(
  described: RunShapes,
  config: types.Config,
) -> dict[str, int]:
  """Counts the copies of weights while they are sent to a sampler.

  Merging adapters copies their kernels, or all of a quantized base.
  """
  policy = described.policy
  whole = _cast(policy.base, described, config.model.dtype)
  is_quantized = quantized.kind_of(policy.frozen) is not None
  merged = (
    whole if is_quantized else _adapted(policy.frozen, described.state.params)
  )
  # The sampler keeps its old weights until it has the new ones.
  is_local = config.rollout.backend == "jax"
  return {"merged weights": merged, "new sampler": whole if is_local else 0}


def _adapted(frozen: Any, trained: Any) -> int:  # Any: nested parameters.
  """Counts the bytes of the kernels that have adapters."""
  if not frozen:
    return 0
  if "lora_a" in trained:
    return update_bytes.num_bytes(frozen["kernel"])
  return sum(_adapted(frozen[name], trained[name]) for name in trained)


def longest_row(
  config: types.Config,
  prompt_tokens: int,
) -> int:
  """Counts the tokens of the longest prompt with the longest completion.

  With a student, its probe is part of the prompt.
  """
  if config.recipe == "gkd":
    sampled = gkd_batches.max_new_tokens(config)
    return min(prompt_tokens + sampled, config.packing.length)
  sampling = config.sampling
  probe = sampling.probe.max_completion_tokens if "probe" in sampling else 0
  return prompt_tokens + probe + sampling.teach.max_completion_tokens


def is_sampled(config: types.Config) -> bool:
  """Returns whether training samples from the policy."""
  if config.recipe == "gkd":
    return gkd_batches.max_new_tokens(config) > 0
  return config.recipe == "grpo"


def with_changes(
  config: types.Config,
  changes: Mapping[str, object],
) -> Any:
  """Returns a copy of a config with some values changed, by dotted key."""
  changed = config.copy_and_resolve_references()
  changed.update_from_flattened_dict(changes)
  return changed


def _settings(section: types.Config) -> dict[str, Any]:
  """Returns the arguments of `decoder.build`, for simulated CPU devices."""
  settings = dict(section.items())
  for key in (
    "path",
    "ignore_fields",
    "chat_template",
    "chat_template_kwargs",
    "param_dtype",
  ):
    del settings[key]
  settings["attention"] = "auto"  # GPU kernels are unavailable on a CPU.
  return settings


def _place(mesh: jax.sharding.Mesh, params: Any) -> Any:
  return train_state.placed(params, sharding.of_params(mesh, params))


def _cast(model: decoder.Model, described: RunShapes, dtype: str) -> int:
  """Counts the bytes of a model's weights in another precision."""
  return update_bytes.num_bytes(
    _place(described.mesh, load.describe(model, dtype))
  )


def _rows(
  config: types.Config,
  mesh: jax.sharding.Mesh,
  shape: decoder_config.DecoderConfig,
  prompt_tokens: int,
) -> update_bytes.Rows:
  """Returns the rows of the largest update up to the longest sequence."""
  if config.recipe == "gkd":
    layout = batch_shapes.of_gkd(config, mesh)
    chunk_tokens = config.loss.chunk_tokens
  elif config.recipe == "grpo":
    layout = batch_shapes.of_grpo(
      config, mesh, max_positions=shape.max_positions
    )
    chunk_tokens = config.logits.chunk_tokens
  else:
    return _sft_rows(config, mesh, shape.max_positions)
  longest = longest_row(config, prompt_tokens)
  num_shorter = sum(found.length < longest for found in layout.menu)
  largest = max(
    layout.menu[: num_shorter + 1],
    key=lambda found: (found.length * found.num_rows, found.length),
  )
  return update_bytes.Rows(
    largest.num_rows // layout.num_shards,
    largest.num_microbatches,
    largest.length,
    chunk_tokens,
  )


def _sft_rows(
  config: types.Config,
  mesh: jax.sharding.Mesh,
  max_positions: int,
) -> update_bytes.Rows:
  num_microbatches = sharding.num_microbatches(mesh, **config.batch)
  length = packing.row_length(config.packing.length, max_positions)
  sharding.check_length(mesh, length, where="--config.packing.length")
  per_device = (
    config.batch.size // sharding.num_row_shards(mesh) // num_microbatches
  )
  return update_bytes.Rows(
    per_device,
    num_microbatches,
    length,
    config.loss.chunk_tokens,
  )


def _students(
  described: RunShapes,
  config: types.Config,
) -> dict[str, int]:
  """Counts the bytes of the student, if it is in the training process."""
  is_sampled = config.rollout.backend == "jax"
  if "student" not in config or not (is_sampled or config.reward.weights.rlt):
    return {}
  model = frozen(described.mesh, config.student)
  found = {"student": _cast(model, described, config.student.param_dtype)}
  if is_sampled:
    found["student's sampler"] = _cast(model, described, config.student.dtype)
  return found


def _teacher(
  mesh: jax.sharding.Mesh,
  config: types.Config,
) -> gkd.Teacher:
  model = frozen(mesh, config.teacher)
  kept = load.describe(model, config.teacher.param_dtype)
  return gkd.Teacher(model, _place(mesh, kept))


def frozen(
  mesh: jax.sharding.Mesh,
  section: types.Config,
) -> decoder.Model:
  """Builds a model that is not trained."""
  directory = load.resolve(section.path, with_weights=False)
  shape, _ = load.read_config(directory, ignore_fields=section.ignore_fields)
  return decoder.build(
    shape, **_settings(section), layout=sharding.of_activations(mesh)
  )


def _cache(
  described: RunShapes,
  config: types.Config,
  *,
  prompt_tokens: int,
) -> int:
  """Counts the bytes of the larger KV cache: the policy's or the student's."""
  sampling, batch = config.sampling, config.batch
  longest = longest_row(config, prompt_tokens)
  if config.recipe == "gkd":
    num_rows = batch.num_prompts * sampling.complete.group_size
  else:
    num_rows = batch.num_questions * sampling.teach.group_size
  caches = [(described.policy.base, num_rows, longest)]
  if "student" in config:
    student, solve = frozen(described.mesh, config.student), sampling.solve
    taught = prompt_tokens + sampling.teach.max_completion_tokens
    taught += config.roles.student.max_thinking_tokens
    caches.append(
      (
        student,
        num_rows * solve.group_size,
        taught + solve.max_completion_tokens,
      )
    )
  return max(
    update_bytes.of_cache(
      model,
      num_rows=min(num_rows, config.sampler.max_rows),
      num_slots=num_slots,
      mesh=described.mesh,
    )
    for model, num_rows, num_slots in caches
  )
