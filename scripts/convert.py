# SPDX-License-Identifier: Apache-2.0
"""Looks into model directories in Hugging Face format, without a framework.

  python -m scripts.convert inspect DIR    names, dtypes, shapes and bytes
  python -m scripts.convert verify A B     are all tensors bit for bit equal?

Only headers are read by `inspect`. `verify` exits with 5 if a tensor differs.
"""

import pathlib
import sys

from absl import app

from atlas_jax import errors
from conversion import shards, verify


def main(argv: list[str]) -> None:
  """Runs one of the two commands."""
  match argv[1:]:
    case ["inspect", directory]:
      command, paths = _inspect, [pathlib.Path(directory)]
    case ["verify", left, right]:
      command, paths = _verify, [pathlib.Path(left), pathlib.Path(right)]
    case other:
      raise app.UsageError(
        f"Expected 'inspect DIR' or 'verify A B', got {other}."
      )
  try:
    command(*paths)
  except errors.AtlasError as error:
    print(error, file=sys.stderr)
    sys.exit(int(error.exit_code))


def _inspect(directory: pathlib.Path) -> None:
  """Lists every tensor, and what they take together."""
  tensors = shards.open_directory(directory)
  for name, tensor in sorted(tensors.items()):
    size = tensor.end - tensor.begin
    print(f"{size:>14,}  {tensor.dtype!s:<9} {tensor.shape!s:<20} {name}")
  total = sum(tensor.end - tensor.begin for tensor in tensors.values())
  print(f"{total:>14,}  bytes in {len(tensors)} tensors")


def _verify(left: pathlib.Path, right: pathlib.Path) -> None:
  """Says that two directories hold the same tensors, or which differ."""
  differing = verify.differing_tensors(left, right)
  if differing:
    raise errors.CheckpointError(
      f"{len(differing)} tensors differ.",
      where=f"{left} and {right}",
      why=", ".join(differing),
      fix="Export again from the checkpoint you trust.",
    )
  print(f"All tensors of {left} and {right} are equal, bit for bit.")


if __name__ == "__main__":
  app.run(main)
