# SPDX-License-Identifier: Apache-2.0
"""Reads Hugging Face Hub datasets; requires the `hub` extra."""

from collections.abc import Iterator

from atlas_jax import errors

try:
  import datasets
  from datasets import exceptions
except ImportError as import_error:
  raise errors.ConfigError(
    "Hub datasets require the package `datasets`.",
    where="--config.data.path",
    why="The package `datasets` is not installed.",
    fix="Run pip install 'atlas_jax[hub]', or set a file or directory: a copy "
    "of the dataset's repository is read without the package.",
  ) from import_error


def read(
  name: str,
  *,
  revision: str,
  subset: str = "",
  split: str = "",
  file: str = "",
) -> Iterator[dict[str, object]]:
  """Yields the rows of a dataset, downloaded or from the cache.

  Args:
    name: as "owner/name".
    revision: a branch, tag or commit; empty for the main branch.
    subset: configuration name of the dataset; empty for the only one.
    split: in the syntax of `datasets`; empty for the only one.
    file: a file of the repository, instead of a subset and a split.

  Raises:
    errors.DataError: if it cannot be loaded, or has several splits and `split`
      is empty.
  """
  try:
    loaded = datasets.load_dataset(
      name,
      subset or None,
      split="train" if file else split or None,
      data_files=file or None,
      revision=revision or None,
    )
  except (
    OSError,
    ValueError,
    exceptions.DatasetGenerationError,
  ) as error:
    raise errors.DataError(
      "Cannot load Hub dataset.",
      where=":".join(filter(None, (name, file or f"{subset}/{split}"))),
      why=f"{type(error).__name__}: {error}".splitlines()[0],
      fix="Check the name, the network and, for a gated dataset, HF_TOKEN. A "
      "local path was not found either.",
    ) from error
  if isinstance(loaded, dict):
    if len(loaded) > 1:
      raise errors.DataError(
        "A Hub dataset has more than one split.",
        where=name,
        why=f"Its splits are: {', '.join(map(str, loaded))}.",
        fix=f'Name one, e.g. "{name}:{next(iter(loaded))}".',
      )
    (loaded,) = loaded.values()
  for row in loaded:
    yield dict(row)
