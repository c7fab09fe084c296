# SPDX-License-Identifier: Apache-2.0
"""What a run leaves: a Hugging Face directory that says what it trained."""

from collections.abc import Mapping
import dataclasses
import pathlib
import shutil
from typing import Any

from absl import logging
import jax

from atlas_jax import distributed
from atlas_jax.models import decoder, lora, quantized
from atlas_jax.train import trainable
from atlas_jax.train.telemetry import writer
from conversion import card, peft_adapters, save, verify
from scripts.job import components


def write(  # noqa: PLR0913 - one argument per config key.
  workdir: pathlib.Path,
  opened: components.OpenModel,
  policy: trainable.Policy,
  trained: decoder.Params,
  step: int | None,
  *,
  facts: Mapping[str, str],
  enabled: bool,
  keep_steps: int,
  dtype: Any,  # Any: one of `save.save`'s literals, out of a config.
  max_shard_bytes: int,
) -> None:
  """Writes a Hugging Face directory, and compares its logits with the model's.

  Of several processes each writes a part, and none holds all parameters.
  Adapters are merged into it, and at the end written by themselves too.

  Args:
    workdir: the directory is `export` in it, or `export-STEP`; that of the
      adapters, which PEFT opens, is `adapter`.
    opened: the model that was trained.
    policy: what of it.
    trained: its weights now.
    step: how many steps are done; None at the end of the run.
    facts: for the model card, beside the run's last metrics.
    enabled: whether to write `export`; the last checkpoint has its weights too.
    keep_steps: how many of the newest `export-STEP` to keep; 0 to write none.
    dtype: of the weights.
    max_shard_bytes: of one file.

  Raises:
    errors.CheckpointError: if it cannot be written, or says something else.
  """
  if not (enabled if step is None else keep_steps):
    return
  params = policy.merged_params(trained)
  about = card.Card(
    base=opened.name,
    facts=facts,
    metrics=writer.last(workdir),
    rounded_to=quantized.kind_of(opened.params) or "",
  )
  directory = workdir / ("export" if step is None else f"export-{step}")
  save.save(
    directory,
    params,
    opened.model,
    source=opened.directory,
    dtype=dtype,
    max_shard_bytes=max_shard_bytes,
    about=about,
    overwrite=True,
    share=components.share(),
  )
  # Its few rows need not divide over the mesh.
  model = dataclasses.replace(opened.model, layout=None)
  difference = verify.logits_equal(directory, params, model, tolerance=1e-4)
  logging.info(
    "Exported to %s; logits differ by %.1e at most. %s",
    *(directory, difference, save.describe_carried(opened.directory)),
  )
  if policy.adapters is not None and jax.process_count() > 1:
    trained = jax.tree.map(distributed.gather, trained)  # They are small.
  if not distributed.is_first():
    return
  if step is None and policy.adapters is not None:
    _write_adapters(
      workdir / "adapter", opened, policy.adapters, trained, about
    )
  if step is not None:
    numbers = (p.name.removeprefix("export-") for p in workdir.iterdir())
    steps = sorted(int(number) for number in numbers if number.isdecimal())
    for old in steps[:-keep_steps]:
      shutil.rmtree(workdir / f"export-{old}")


def _write_adapters(
  directory: pathlib.Path,
  opened: components.OpenModel,
  adapters: lora.Lora,
  trained: decoder.Params,
  about: card.Card,
) -> None:
  """Writes a PEFT directory, unless the family's files leave no names."""
  if not peft_adapters.has_names(opened.model):
    logging.warning("PEFT has no names for these adapters; only merged.")
    return
  peft_adapters.save_directory(
    directory,
    trained,
    opened.model,
    settings=adapters,
    source=opened.directory,
    about=about,
  )
  logging.info("Wrote the adapters to %s.", directory)
