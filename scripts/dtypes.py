# SPDX-License-Identifier: Apache-2.0
"""Names of precisions, with the short forms of other libraries."""

from collections.abc import Sequence

from absl import flags

from atlas_jax import errors

_ALIASES = {
  "bf16": "bfloat16",
  "fp32": "float32",
  "f32": "float32",
  "float": "float32",
  "fp16": "float16",
  "f16": "float16",
  "half": "float16",
  "4bit": "nf4",
  "8bit": "int8",
}


def parse(name: str, allowed: Sequence[str], *, where: str) -> str:
  """Returns the full name of a precision.

  Raises:
    errors.ConfigError: if it is not one of `allowed`.
  """
  full = _ALIASES.get(name.lower().removeprefix("torch."), name)
  if full in allowed:
    return full
  names = ", ".join(filter(None, allowed))
  raise errors.ConfigError(
    f"Unsupported precision {name!r}.",
    where=where,
    why=f"Supported: {names}.",
    fix="Set one of them.",
  )


class _Parser(flags.ArgumentParser[str]):
  """Parses a precision; other names are invalid flag values."""

  def __init__(self, allowed: Sequence[str]) -> None:
    self.enum_values = list(allowed)

  def parse(self, argument: str) -> str:
    """Returns the full name."""
    full = _ALIASES.get(argument.lower(), argument)
    if full not in self.enum_values:
      raise ValueError(
        f"it should be one of {', '.join(filter(None, self.enum_values))}"
      )
    return full


def define_flag(
  name: str,
  default: str,
  allowed: Sequence[str],
  text: str,
  *,
  flag_values: flags.FlagValues = flags.FLAGS,
) -> flags.FlagHolder[str]:
  """Defines a flag whose value is one of `allowed`, or short for it."""
  return flags.DEFINE(
    _Parser(allowed), name, default, text, flag_values=flag_values
  )
