# SPDX-License-Identifier: Apache-2.0
"""Checks config values that no single layer checks, before a job starts."""

from collections.abc import Iterator
import typing

import ml_collections

from atlas_jax import errors, types
from atlas_jax.models import decoder, kernels, quantized
from scripts import dtypes

_FLOATS = ("float32", "bfloat16")
_PARAMS = (*_FLOATS, *quantized.KINDS)
_CHOICES = {
  "remat": typing.get_args(decoder.Remat),
  "attention": ("auto", *typing.get_args(kernels.Kernel)),
}


def check(config: types.Config) -> None:
  """Checks precisions, models and sampling; replaces short names in place.

  Raises:
    errors.ConfigError: if a value is invalid; names its key.
  """
  for name, section in _sections(config, "config"):
    for key in ("dtype", "param_dtype"):
      if key in section:
        allowed = _FLOATS if key == "dtype" else _PARAMS
        # `reference.dtype` is empty by default.
        allowed = (*allowed, "") if name == "config.reference" else allowed
        section[key] = dtypes.parse(
          section[key], allowed, where=f"--{name}.{key}={section[key]}"
        )
    for key, choices in _CHOICES.items():
      if key in section and section[key] not in choices:
        raise errors.ConfigError(
          f"{key} must be one of {', '.join(choices)}, got {section[key]!r}.",
          where=f"--{name}.{key}={section[key]}",
          why="No other value is defined.",
          fix="Set one of them.",
        )
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
  section: types.Config, name: str
) -> Iterator[tuple[str, types.Config]]:
  """Yields every section with its dotted name."""
  yield name, section
  for key, value in section.items(preserve_field_references=True):
    if isinstance(value, ml_collections.ConfigDict):
      yield from _sections(value, f"{name}.{key}")
