# SPDX-License-Identifier: Apache-2.0
"""Rows of datasets on the Hugging Face Hub; needs the `datasets` extra."""

import datasets

from atlas_jax import errors


def read(name: str, *, split: str | None) -> list[dict[str, object]]:
  """Downloads a dataset, or finds it in the cache.

  Args:
    name: as "owner/name".
    split: which part, in the language of `datasets`; None for the only one.

  Raises:
    errors.DataError: if it cannot be loaded, or has more parts than one and
      none was named.
  """
  try:
    loaded = datasets.load_dataset(name, split=split)
  except (OSError, ValueError) as error:
    raise errors.DataError(
      "A dataset cannot be loaded.",
      where=name if split is None else f"{name}:{split}",
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
  return [dict(row) for row in loaded]
