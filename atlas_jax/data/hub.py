# SPDX-License-Identifier: Apache-2.0
"""Datasets on the Hugging Face Hub; needs the `hub` extra."""

from collections.abc import Iterator

from atlas_jax import errors

try:
  import datasets
  from datasets import exceptions
except ImportError as import_error:
  raise errors.ConfigError(
    "Datasets on the Hub cannot be loaded here.",
    where="--config.data.path",
    why="The package `datasets` is not installed.",
    fix="pip install 'atlas_jax[hub]', or name a file or a folder: a copy of "
    "the dataset's repository is read without it.",
  ) from import_error


def read(
  name: str,
  *,
  revision: str,
  subset: str = "",
  split: str = "",
  file: str = "",
) -> Iterator[dict[str, object]]:
  """Downloads a dataset, or finds it in the cache, and yields its rows.

  Args:
    name: as "owner/name".
    revision: a branch, tag or commit; empty for the main branch.
    subset: what the dataset's page calls so; empty for the only one.
    split: which part, in the language of `datasets`; empty for the only one.
    file: of the repository, instead of a subset and a split.

  Raises:
    errors.DataError: if it cannot be loaded, or has more parts than one and
      none was named.
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
      "A dataset cannot be loaded.",
      where=":".join(filter(None, (name, file or f"{subset}/{split}"))),
      why=f"{type(error).__name__}: {error}".splitlines()[0],
      fix="Check the name and the network, and for a gated dataset HF_TOKEN. "
      "If a path was meant, there is no such file here.",
    ) from error
  if isinstance(loaded, dict):
    if len(loaded) > 1:
      raise errors.DataError(
        "A dataset has more than one split.",
        where=name,
        why=f"Its splits are: {', '.join(map(str, loaded))}.",
        fix=f'Name one, e.g. "{name}:{next(iter(loaded))}".',
      )
    (loaded,) = loaded.values()
  for row in loaded:
    yield dict(row)
