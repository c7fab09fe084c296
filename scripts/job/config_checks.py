# SPDX-License-Identifier: Apache-2.0
"""Checks config values before a job opens models and data.

A typo then fails in a second, not after minutes of loading.
"""

from collections.abc import Iterator, Sequence
import re
import typing

import ml_collections

from atlas_jax import checkpoint, errors, types
from atlas_jax.data import packing, sets
from atlas_jax.losses import advantages, correction, grpo
from atlas_jax.models import decoder, kernels, lora, quantized
from atlas_jax.rewards import rules
from atlas_jax.rewards import teaching as teaching_reward
from atlas_jax.teaching import templates
from atlas_jax.train import loop, optimizer, schedule
from atlas_jax.train.guards import alarm
from conversion import load
from rollout import sampler
from scripts import dtypes

_FLOATS = ("float32", "bfloat16")
_PARAMS = (*_FLOATS, *quantized.KINDS)
_MODELS = ("model", "student", "teacher")
_CHOICES = {
  **{f"{name}.remat": typing.get_args(decoder.Remat) for name in _MODELS},
  **{
    f"{name}.attention": ("auto", *typing.get_args(kernels.Kernel))
    for name in _MODELS
  },
  "packing.too_long": typing.get_args(packing.TooLong),
  "advantages.baseline": typing.get_args(advantages.Baseline),
  "advantages.scale": typing.get_args(advantages.Scale),
  "correction.level": typing.get_args(correction.Level),
  "correction.outside": typing.get_args(correction.Outside),
}
# The least and the largest value of a key.
_BOUNDS = {
  **dict.fromkeys(
    (
      "batch.num_iterations",
      "batch.num_minibatches",
      "batch.num_prompts",
      "batch.num_questions",
      "batch.size",
      "batch_size",
      "export.max_shard_bytes",
      "logits.chunk_tokens",
      "loss.chunk_tokens",
      "packing.length",
      "sampler.max_rows",
      *(f"{name}.unroll" for name in _MODELS),
    ),
    (1, None),
  ),
  **dict.fromkeys(
    (
      "batch.per_device",
      "data.max_bad_rows",
      "data.max_rows",
      "num_epochs",
      "optimizer.max_grad_norm",
      "optimizer.weight_decay",
      "reference.sync_every",
      "schedule.learning_rate",
    ),
    (0, None),
  ),
  **dict.fromkeys(
    (
      "completions.on_policy_fraction",
      "held_out.fraction",
      "loss.beta",
      "reference.mix",
      "samples.stored_fraction",
    ),
    (0, 1),
  ),
}
_PATTERNS = ("lora.targets", "optimizer.frozen", "optimizer.not_decayed")


def check(config: types.Config) -> None:
  """Checks values, and replaces short names of precisions in place.

  Raises:
    errors.ConfigError: if a value is invalid; names its key.
  """
  for name, section in _sections(config, ""):
    for key in ("dtype", "param_dtype"):
      if key in section:
        _check_precision(section, f"{name}{key}", key)
    for key in section:
      is_automatic = key == "length" and config.recipe == "sft"
      if not (is_automatic and section[key] == 0):
        _check_value(f"{name}{key}", section)
      if f"{name}{key}" in _PATTERNS:
        _check_patterns(f"{name}{key}", section[key])
  _check_mesh(config.mesh)
  _check_sections(config)


def check_models(config: types.Config) -> None:
  """Checks that the folders of all models exist, unless a world will have them.

  Raises:
    errors.CheckpointError: see `load.find`.
  """
  if not config.world.directory:
    for name in _MODELS:
      if name in config:
        load.find(config[name].path)


def _check_precision(section: types.Config, name: str, key: str) -> None:
  allowed = _FLOATS if key == "dtype" else _PARAMS
  if name == "reference.dtype":
    allowed = (*allowed, "")
  where = f"--config.{name}={section[key]}"
  section[key] = dtypes.parse(section[key], allowed, where=where)


def _check_value(name: str, section: types.Config) -> None:
  """Checks the choices or the bounds of one key."""
  if name not in _CHOICES and name not in _BOUNDS:
    return
  value = section[name.rpartition(".")[2]]
  if name in _CHOICES:
    rule, is_valid = (
      f"one of {', '.join(_CHOICES[name])}",
      value in _CHOICES[name],
    )
  else:
    low, high = _BOUNDS[name]
    rule = f"at least {low}" if high is None else f"in [{low}, {high}]"
    is_valid = low <= value and (high is None or value <= high)
  if not is_valid:
    raise errors.ConfigError(
      f"{name} must be {rule}, got {value!r}.",
      where=f"--config.{name}={value}",
      why="Other values have no meaning; see docs/config.md.",
      fix="Change the value, or remove the flag to use the default.",
    )


def _check_patterns(name: str, patterns: Sequence[str]) -> None:
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as error:
      raise errors.ConfigError(
        f"{name} has an invalid regular expression.",
        where=f"--config.{name}={pattern}",
        why=str(error),
        fix="Escape special characters, as in r'a\\.b'.",
      ) from error


def _check_mesh(mesh: types.Config) -> None:
  """Checks that at most one axis takes all remaining devices."""
  rest = [axis for axis, size in mesh.items() if size == -1]
  if len(rest) > 1:
    raise errors.ConfigError(
      f"At most one mesh axis may be -1, got {', '.join(rest)}.",
      where="--config.mesh",
      why="An axis of -1 takes all devices that the others leave.",
      fix=f"Set all but one to a number, such as --config.mesh.{rest[0]}=1.",
    )


def _check_sections(config: types.Config) -> None:
  """Creates what can be created without a model, which checks its settings."""
  if "schedule" in config:
    rate = schedule.make(**config.schedule, num_steps=1)
    optimizer.make_optimizer(rate, **config.optimizer)
    lora.Lora(**{key: config.lora[key] for key in ("rank", "alpha", "targets")})
    # Where epochs count, the number of steps is not known yet.
    num_steps = config.loop.num_steps or 10**9
    loop.Settings(**{**config.loop, "num_steps": num_steps})
    saved = config.checkpoint
    checkpoint.check_settings(
      saved.keep, saved.best_metric, saved.best_mode, saved.load_best
    )
    sets.HeldOut(**config.held_out)
  if "advantages" in config:
    grpo.Objective(**config.loss, max_tokens=1)
    alarm.Alarm(**config.alarm)
  if "rollout" in config:
    sampler.Settings(**config.rollout)
  if "templates" in config:
    templates.Templates(**config.templates)
  if "reward" in config and config.reward.weights.teaching:
    teaching_reward.build(**config.reward.teaching)
  if "reward" in config and config.reward.weights.overlong:
    rules.overlong(**config.reward.overlong, max_tokens=1)
  for name, section in config.get("sampling", {}).items():
    try:
      types.SamplingParams(**section, seed=0)
    except ValueError as error:
      raise errors.ConfigError(
        "Invalid sampling parameters.",
        where=f"--config.sampling.{name}",
        why=str(error),
        fix="Change the value that is out of range.",
      ) from error


def _sections(
  section: types.Config, prefix: str
) -> Iterator[tuple[str, types.Config]]:
  """Yields every section with the prefix of its keys."""
  yield prefix, section
  for key, value in section.items(preserve_field_references=True):
    if isinstance(value, ml_collections.ConfigDict):
      yield from _sections(value, f"{prefix}{key}.")
