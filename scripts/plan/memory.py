# SPDX-License-Identifier: Apache-2.0
"""From a recipe's config to the bytes that each device needs; see `train.plan`.

Whatever is trained, scored or sampled is described with the functions that the
recipe makes it with, on as many simulated devices as the run will have.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import optax

from atlas_jax import sharding
from atlas_jax.models import decoder, decoder_config, lora, quantized
from atlas_jax.train import gkd, gkd_batches, grpo, train_state, trainable
from atlas_jax.train import optimizer as train_optimizer
from conversion import load
from scripts.plan import update_bytes


@dataclasses.dataclass(frozen=True)
class RunShapes:
  """A run that was described, and not begun; see `update_bytes.of_update`."""

  policy: trainable.Policy
  state: train_state.TrainState
  optimizer: optax.GradientTransformation
  build: update_bytes.Build
  rows: update_bytes.Rows
  mesh: jax.sharding.Mesh
  teacher: gkd.Teacher | None


@dataclasses.dataclass(frozen=True)
class Need:
  """Bytes of one device, by what they are for.

  Attributes:
    resident: there all the time.
    phases: what each phase of a step adds; they follow each other.
    on_host: what waits in the host's memory, for each device.
  """

  resident: Mapping[str, int]
  phases: Mapping[str, Mapping[str, int]]
  on_host: int

  @property
  def peak(self) -> int:
    """The most that is there at one time."""
    most = max(sum(phase.values()) for phase in self.phases.values())
    return sum(self.resident.values()) + most


def describe(
  config: Any,  # Any: a ConfigDict, whose values have no static type.
  shape: decoder_config.DecoderConfig,
  *,
  prompt_tokens: int,
) -> RunShapes:
  """Describes the run of a config.

  Args:
    config: of a recipe.
    shape: of the model that is trained.
    prompt_tokens: of the longest question, in its template.

  Raises:
    errors.AtlasError: if the config does not fit the devices, or itself.
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
  reference = "reward" in config and grpo.needs_copy(policy, config)
  state = train_state.describe(
    trained,
    optimizer,
    mesh=mesh,
    reference=trained if reference else None,
    offload=train_state.Offload(**config.offload),
  )
  return RunShapes(
    policy,
    state,
    optimizer,
    functools.partial(decoder.build, **settings),
    _rows(config, mesh, prompt_tokens),
    mesh,
    _teacher(mesh, config) if "teacher" in config else None,
  )


def need(
  job: RunShapes,
  config: Any,  # Any: as in `describe`.
  *,
  prompt_tokens: int,
) -> Need:
  """Counts what each device needs; see `describe`."""
  update = update_bytes.of_update(
    *(job.policy, job.state, job.build, job.rows),
    mesh=job.mesh,
    teacher=job.teacher,
  )
  names = ("parameters", "frozen base", "optimizer", "reference", "teacher")
  resident = {name: update.pop(name) for name in names}
  phases = {"update": update}
  if "reward" in config:
    resident |= _students(job, config)
  if is_sampled(config):
    if config.rollout.backend == "jax":
      resident["sampler"] = _cast(job.policy.base, job, config.model.dtype)
      phases["sampling"] = {
        "KV cache": _cache(job, config, prompt_tokens=prompt_tokens)
      }
    if quantized.kind_of(job.policy.frozen):
      phases["push"] = _push(job, config)
  return Need(
    {name: size for name, size in resident.items() if size},
    phases,
    update_bytes.num_bytes(job.state, on_host=True),
  )


def _push(
  job: RunShapes,
  config: Any,  # Any: as in `describe`.
) -> dict[str, int]:
  """Counts what is made of a base in few bits for a sampler."""
  whole = _cast(job.policy.base, job, config.model.dtype)
  # The sampler has its old weights until it has the new ones.
  copies = {"new sampler": whole} if config.rollout.backend == "jax" else {}
  return {"merged weights": whole, **copies}


def longest_row(
  config: Any,  # Any: as in `describe`.
  prompt_tokens: int,
) -> int:
  """Counts the tokens of the longest prompt with the longest completion.

  Where there is a student, its probe is in the prompt.
  """
  if "teacher" in config:
    sampled = gkd_batches.max_new_tokens(config)
    return min(prompt_tokens + sampled, config.packing.length)
  sampling = config.sampling
  probe = sampling.probe.max_completion_tokens if "probe" in sampling else 0
  return prompt_tokens + probe + sampling.teach.max_completion_tokens


def is_sampled(config: Any) -> bool:  # Any: as in `describe`.
  """Tells whether the policy writes anything in training."""
  if "teacher" in config:
    return gkd_batches.max_new_tokens(config) > 0
  return "reward" in config


def with_changes(
  config: Any,  # Any: as in `describe`.
  changes: Mapping[str, object],
) -> Any:
  """Gives a copy of a config with other values, by their dotted names."""
  changed = config.copy_and_resolve_references()
  changed.update_from_flattened_dict(changes)
  return changed


def _settings(section: Any) -> dict[str, Any]:  # Any: as in `describe`.
  """Gives what `decoder.build` is asked for, on the devices at hand."""
  settings = dict(section.items())
  del settings["path"], settings["param_dtype"]
  settings["attention"] = "auto"  # The kernels of a GPU are not on a CPU.
  return settings


def _place(mesh: jax.sharding.Mesh, params: Any) -> Any:
  return train_state.placed(params, sharding.of_params(mesh, params))


def _cast(model: decoder.Model, job: RunShapes, dtype: str) -> int:
  """Counts the weights of a model in another precision."""
  return update_bytes.num_bytes(_place(job.mesh, load.describe(model, dtype)))


def _rows(
  config: Any,  # Any: as in `describe`.
  mesh: jax.sharding.Mesh,
  prompt_tokens: int,
) -> update_bytes.Rows:
  """Counts the rows of an update."""
  if "teacher" in config:
    return _packed_rows(
      config,
      mesh,
      longest_row(config, prompt_tokens),
      num_sequences=config.batch.num_prompts
      * config.sampling.complete.group_size,
      chunk_tokens=config.loss.chunk_tokens,
    )
  if "reward" in config:
    batch, teach = config.batch, config.sampling.teach
    return _packed_rows(
      config,
      mesh,
      longest_row(config, prompt_tokens),
      num_sequences=batch.num_questions
      * teach.group_size
      / batch.num_minibatches,
      chunk_tokens=config.logits.chunk_tokens,
    )
  return _sft_rows(config, mesh)


def _sft_rows(
  config: Any,  # Any: as in `describe`.
  mesh: jax.sharding.Mesh,
) -> update_bytes.Rows:
  num_parts = sharding.num_microbatches(mesh, **config.batch)
  sharding.check_length(
    mesh, config.packing.length, where="--config.packing.length"
  )
  per_device = config.batch.size // sharding.num_row_shards(mesh) // num_parts
  return update_bytes.Rows(
    per_device, num_parts, config.packing.length, config.loss.chunk_tokens
  )


def _packed_rows(
  config: Any,  # Any: as in `describe`.
  mesh: jax.sharding.Mesh,
  longest: int,
  *,
  num_sequences: float,
  chunk_tokens: int,
) -> update_bytes.Rows:
  """Counts the rows of an update, were all its sequences the longest."""
  per_device = config.batch.per_device
  length = max(config.packing.length, longest)
  in_row = length // longest if config.packing.packed else 1
  at_once = sharding.num_row_shards(mesh) * max(per_device, 1)
  times = math.ceil(math.ceil(num_sequences / in_row) / at_once)
  return update_bytes.Rows(
    per_device or times, times if per_device else 1, length, chunk_tokens
  )


def _students(
  job: RunShapes,
  config: Any,  # Any: as in `describe`.
) -> dict[str, int]:
  """Counts the student's weights, where it is in this process."""
  is_sampled = config.rollout.backend == "jax"
  if "student" not in config or not (is_sampled or config.reward.weights.rlt):
    return {}
  model = _frozen(job.mesh, config.student)
  found = {"student": _cast(model, job, config.student.param_dtype)}
  if is_sampled:
    found["student's sampler"] = _cast(model, job, config.student.dtype)
  return found


def _teacher(
  mesh: jax.sharding.Mesh,
  config: Any,  # Any: as in `describe`.
) -> gkd.Teacher:
  model = _frozen(mesh, config.teacher)
  kept = load.describe(model, config.teacher.param_dtype)
  return gkd.Teacher(model, _place(mesh, kept))


def _frozen(
  mesh: jax.sharding.Mesh,
  section: Any,  # Any: as in `describe`.
) -> decoder.Model:
  """Describes a model that is not trained."""
  directory = load.resolve(section.path, with_weights=False)
  shape, _ = load.read_config(pathlib.Path(directory))
  return decoder.build(
    shape, **_settings(section), layout=sharding.of_activations(mesh)
  )


def _cache(
  job: RunShapes,
  config: Any,  # Any: as in `describe`.
  *,
  prompt_tokens: int,
) -> int:
  """Counts the larger of the policy's cache and its student's."""
  sampling, batch = config.sampling, config.batch
  longest = longest_row(config, prompt_tokens)
  if "teacher" in config:
    num_rows = batch.num_prompts * sampling.complete.group_size
  else:
    num_rows = batch.num_questions * sampling.teach.group_size
  asked = [(job.policy.base, num_rows, longest)]
  if "student" in config:
    student, solve = _frozen(job.mesh, config.student), sampling.solve
    taught = prompt_tokens + sampling.teach.max_completion_tokens
    asked.append(
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
      mesh=job.mesh,
    )
    for model, num_rows, num_slots in asked
  )
