# SPDX-License-Identifier: Apache-2.0
"""Exports a run's weights as a Hugging Face directory with a model card."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
import shutil
from typing import Any

from absl import logging
import jax

from atlas_jax import distributed, types
from atlas_jax.models import decoder, lora, quantized
from atlas_jax.train import trainable
from atlas_jax.train.telemetry import writer as train_writer
from conversion import card, peft_adapters, save, verify
from scripts.job import components, outcome


def writer(
  workdir: pathlib.Path,
  opened: components.OpenModel,
  policy: trainable.Policy,
  config: types.Config,
  facts: Mapping[str, str],
) -> Callable[[decoder.Params, int | None], None]:
  """Returns `write` for a run: for `loop.Run.on_save` and the final export."""
  return functools.partial(
    write, workdir, opened, policy, facts=facts, **config.export
  )


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
  """Writes a Hugging Face directory and compares its logits with the model's.

  Each process writes the parts it owns; no process gathers all parameters.
  Adapters are merged, and at the end of a run also saved as a PEFT directory.

  Args:
    workdir: parent of `export` or `export-STEP`, and of the PEFT directory
      `adapter`.
    opened: the model that was trained.
    policy: which of the model's parameters were trained.
    trained: the trained parameters.
    step: number of completed steps; None at the end of the run.
    facts: for the model card, next to the run's last metrics.
    enabled: whether to write `export`; the last checkpoint has the same
      weights.
    keep_steps: number of newest `export-STEP` to keep; 0 writes none.
    dtype: of the written weights.
    max_shard_bytes: largest size of one file.

  Raises:
    errors.CheckpointError: if writing fails, or the logits of the written
      weights differ.
  """
  if not (enabled if step is None else keep_steps):
    return
  params = policy.merged_params(trained)
  about = card.Card(
    base=opened.name,
    facts=facts,
    metrics=train_writer.last(workdir),
    rounded_to=quantized.kind_of(opened.params) or "",
    warning=outcome.UNTRAINED if train_writer.is_untrained(workdir) else "",
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
    chat_template=opened.chat_template,
    share=components.share(),
  )
  # The check uses few rows, which need not divide over the mesh.
  model = dataclasses.replace(opened.model, layout=None)
  difference = verify.logits_equal(directory, params, model, tolerance=1e-4)
  logging.info(
    "Exported to %s; largest difference of logits %.1e. %s",
    directory,
    difference,
    save.describe_carried(opened.directory, opened.chat_template),
  )
  if policy.adapters is not None and jax.process_count() > 1:
    trained = jax.tree.map(distributed.gather, trained)  # Adapters are small.
  if not distributed.is_first():
    return
  if step is None and policy.adapters is not None:
    _write_adapters(
      workdir / "adapter", opened, policy.adapters, trained, about
    )
  if step is not None:
    _prune_steps(workdir, keep_steps)


def _prune_steps(workdir: pathlib.Path, keep: int) -> None:
  """Removes all but the newest `keep` of the `export-STEP` directories."""
  numbers = (p.name.removeprefix("export-") for p in workdir.iterdir())
  steps = sorted(int(number) for number in numbers if number.isdecimal())
  for old in steps[:-keep]:
    shutil.rmtree(workdir / f"export-{old}")


def _write_adapters(
  directory: pathlib.Path,
  opened: components.OpenModel,
  adapters: lora.Lora,
  trained: decoder.Params,
  about: card.Card,
) -> None:
  """Writes a PEFT directory, or warns if PEFT does not support the family."""
  if not peft_adapters.has_names(opened.model):
    logging.warning(
      "PEFT has no names for this family's adapters; exported merged only."
    )
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
