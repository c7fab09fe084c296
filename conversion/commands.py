# SPDX-License-Identifier: Apache-2.0
"""What `scripts.convert` does: to and from Hugging Face format, and compare."""

from collections.abc import Sequence
import dataclasses
import functools
import math
import pathlib
from typing import Literal

import numpy as np

from atlas_jax import checkpoint_format, errors
from atlas_jax.models import decoder, lora, quantized
from conversion import (
  card,
  load,
  orbax_step,
  peft_adapters,
  progress,
  rules,
  save,
  shards,
  target,
  verify,
  weights,
)

_TOLERANCE = 1e-4
_MAX_TOLD = 8


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags of a conversion; `dtype` is empty for that of the input."""

  source: str
  dtype: Literal["", "float32", "bfloat16"]
  max_shard_bytes: int
  overwrite: bool
  merge: bool
  is_dry_run: bool
  with_logits: bool


def to_hf(origin: pathlib.Path, out: pathlib.Path, options: Options) -> None:
  """Writes the parameters of a checkpoint in Hugging Face format.

  Adapters are merged into their base, or written as PEFT has them.

  Raises:
    errors.AtlasError: if an input or the target cannot be used, or what is
      read back differs.
  """
  step = orbax_step.find(origin)
  if step is None:
    raise errors.CheckpointError(
      "There is no checkpoint.",
      where=str(origin),
      why="It is no step, no folder of steps and no workdir with one.",
      fix="Give the --workdir of a run that has saved.",
    )
  if not options.source:
    raise errors.ConfigError(
      "It is not told which model was trained.",
      where="--source",
      why="A checkpoint has no tokenizer, and one of a run no config.",
      fix="Add --source= with the value of --config.model.path.",
    )
  source = load.resolve(options.source)
  model = _build(source)
  checkpoint_format.check(step)
  if settings := orbax_step.adapters(step):
    _adapters_to_hf(step, settings, source, model, out, options)
    return
  stored = weights.of_step(step, model)
  dtype = options.dtype or weights.dtype_of(stored, step)
  num_bytes = save.num_bytes(model, dtype)
  files = shards.layout(
    rules.shapes(model), dtype=dtype, max_shard_bytes=options.max_shard_bytes
  )
  _tell_plan(f"{step} with {source}", out, f"{len(files)} files", num_bytes)
  wanted = weights.cast(stored, dtype)
  if not options.overwrite and _is_done(out, model, wanted):
    return
  save.check(
    out, model, source=source, dtype=dtype, overwrite=options.overwrite
  )
  if options.is_dry_run:
    return
  with progress.telling("Read", _size(stored)) as advance:
    params = orbax_step.read(step, model)
    advance(_size(stored))
  _write(step, params, source, model, out, options, dtype)


def _adapters_to_hf(
  step: pathlib.Path,
  settings: lora.Lora,
  source: pathlib.Path,
  model: decoder.Model,
  out: pathlib.Path,
  options: Options,
) -> None:
  """Does what `to_hf` does, for a run that trained adapters."""
  abstract = lora.only(lora.adapt(model, settings).abstract_params)
  dtype = options.dtype or weights.dtype_of(
    weights.of_directory(source), source
  )
  num_bytes = save.num_bytes(model, dtype) if options.merge else 0
  _tell_plan(f"{step} over {source}", out, f"rank {settings.rank}", num_bytes)
  target.check(out, source, num_bytes=num_bytes, overwrite=options.overwrite)
  if options.is_dry_run:
    return
  adapters = orbax_step.read_tree(step, abstract)
  kept_as = orbax_step.base_kept_as(step)
  params = load.load(source, model, param_dtype=kept_as or "float32")
  params = orbax_step.check_base(step, params)
  if options.merge:
    restored = quantized.whole(params, np.dtype(np.float32))
    merged = lora.merge(restored, adapters, settings.scale)
    _write(step, merged, source, model, out, options, dtype)
    return
  peft_adapters.save_directory(
    out,
    adapters,
    model,
    settings=settings,
    source=source,
    about=_about(step, options),
  )
  print(f"Done: {out}")


def _write(
  step: pathlib.Path,
  params: decoder.Params,
  source: pathlib.Path,
  model: decoder.Model,
  out: pathlib.Path,
  options: Options,
  dtype: Literal["float32", "bfloat16"],
) -> None:
  """Writes a directory, and compares its logits with the parameters'."""
  num_bytes = save.num_bytes(model, dtype)
  with progress.telling("Wrote and read back", num_bytes) as advance:
    save.save(
      out,
      params,
      model,
      source=source,
      dtype=dtype,
      max_shard_bytes=options.max_shard_bytes,
      about=_about(step, options),
      overwrite=options.overwrite,
      progress=advance,
    )
  print(save.describe_carried(source))
  if options.with_logits:
    gap = verify.logits_equal(out, params, model, tolerance=_TOLERANCE)
    print(f"Logits differ by {gap:.1e} at most.")
  print(f"Done: {out}")


def _about(step: pathlib.Path, options: Options) -> card.Card:
  """Tells what is known of a checkpoint."""
  held = (checkpoint_format.read(step) or {})["metrics"]
  number = int(step.name) if step.name.isdecimal() else 0
  return card.Card(
    base=options.source,
    facts={"Checkpoint": str(step)},
    metrics={name: (number, value) for name, value in held.items()},
    rounded_to=orbax_step.base_kept_as(step),
  )


def merge(
  base: str, adapter: pathlib.Path, out: pathlib.Path, options: Options
) -> None:
  """Adds a PEFT adapter to its base, one tensor in memory at a time.

  Raises:
    errors.AtlasError: if an input or the target cannot be used, or what is
      read back differs.
  """
  source = load.resolve(base)
  model = _build(source)
  tensors = load.open_tensors(source, model)
  opened = peft_adapters.open_directory(adapter)
  peft_adapters.check_shapes(opened, model)
  held = weights.of_directory(source)
  dtype = options.dtype or weights.dtype_of(held, source)
  num_bytes = save.num_bytes(model, dtype)
  files = shards.layout(
    rules.shapes(model), dtype=dtype, max_shard_bytes=options.max_shard_bytes
  )
  _tell_plan(f"{source} and {adapter}", out, f"{len(files)} files", num_bytes)
  fetch = peft_adapters.merging(opened, tensors, dtype)
  wanted = {
    name: weights.Weight(np.dtype(dtype), shape, functools.partial(fetch, name))
    for name, shape in rules.shapes(model).items()
  }
  if not options.overwrite and _is_done(
    out, model, weights.cast(wanted, dtype)
  ):
    return
  save.check(
    out, model, source=source, dtype=dtype, overwrite=options.overwrite
  )
  if options.is_dry_run:
    return
  with progress.telling("Wrote and read back", num_bytes) as advance:
    save.write(
      out,
      fetch,
      model,
      source=source,
      dtype=dtype,
      max_shard_bytes=options.max_shard_bytes,
      about=card.Card(base=base, facts={"Adapter": str(adapter)}),
      overwrite=options.overwrite,
      progress=advance,
    )
  print(save.describe_carried(source))
  print(f"Done: {out}")


def from_hf(origin: str, out: pathlib.Path, options: Options) -> None:
  """Writes a model in Hugging Face format as an orbax checkpoint.

  Raises:
    errors.AtlasError: if the input or the target cannot be used, or what is
      read back differs.
  """
  source = load.resolve(origin)
  model = _build(source)
  names = rules.shapes(model)
  held = weights.of_directory(source)
  dtype = options.dtype or weights.dtype_of(held, source)
  num_bytes = save.num_bytes(model, dtype)
  _tell_plan(str(source), out, "an orbax checkpoint", num_bytes)
  # A tied head, and tables that follow from the config, are left behind.
  wanted = {
    name: weight
    for name, weight in weights.cast(held, dtype).items()
    if name in names
  }
  if not options.overwrite and _is_done(out, model, wanted):
    return
  target.check(out, source, num_bytes=num_bytes, overwrite=options.overwrite)
  if options.is_dry_run:
    return
  with progress.telling("Read", num_bytes) as advance:
    params = load.load(source, model, param_dtype=dtype, progress=advance)
  with target.writing(out) as partial:
    with progress.telling("Wrote", num_bytes) as advance:
      orbax_step.write(partial, params, source=source)
      advance(num_bytes)
    del params  # What is read back may not fit beside them.
    with progress.telling("Read back", num_bytes) as advance:
      found = verify.differences(
        wanted, weights.of_step(partial, model), advance
      )
    if found:
      raise _different(source, out, [each.name for each in found])
  print(f"Done: {out}")


def verify_pair(
  left: pathlib.Path, right: pathlib.Path, *, source: str, with_logits: bool
) -> None:
  """Compares two models in either format; prints how they differ.

  Raises:
    errors.CheckpointError: if they differ, or one cannot be read.
  """
  known = [_build_if_computed(path) for path in (left, right)]
  if source:
    known.append(_build(load.resolve(source)))
  # A run's checkpoint has no config: it is of the model that is known.
  a, b = (model or next(filter(None, known), None) for model in known[:2])
  held = [_weights(left, a), _weights(right, b)]
  with progress.telling("Compared", _size(held[0])) as advance:
    found = verify.differences(held[0], held[1], advance)
  changed = verify.config_differences(a, b) if a and b else []
  if not found and not changed:
    print(f"All tensors of {left} and {right} are equal, bit for bit.")
    return
  for line in (*changed, *verify.table(found)):
    print(line)
  shapes = [{n: w.shape for n, w in side.items()} for side in held]
  if with_logits and a and b and shapes[0] == shapes[1]:
    sides = (a, _params(left, a)), (b, _params(right, b))
    gap = verify.logit_gap(*sides)
    print(
      f"Logits differ by {gap.largest:.3g} at most, and by a KL divergence of "
      f"{gap.divergence:.3g} nats."
    )
    print(verify.where_they_part(*sides))
  raise _different(left, right, [*changed, *(each.name for each in found)])


def _build(directory: pathlib.Path) -> decoder.Model:
  config, _ = load.read_config(directory)
  return decoder.build(
    config, dtype="float32", attention="xla", remat="none", unroll=1
  )


def _build_if_computed(path: pathlib.Path) -> decoder.Model | None:
  """Builds the model of a config, if there is one, and it is computed here."""
  place = orbax_step.find(path) or path
  try:
    return _build(place) if (place / "config.json").exists() else None
  except errors.CheckpointError as error:
    print(f"Only tensors are compared: {error.what} ({error.where})")
    return None


def _weights(
  path: pathlib.Path, model: decoder.Model | None
) -> weights.Weights:
  step = orbax_step.find(path)
  if step is None:
    return weights.of_directory(path)
  checkpoint_format.check(step)
  return weights.of_step(step, model)


def _params(path: pathlib.Path, model: decoder.Model) -> decoder.Params:
  step = orbax_step.find(path)
  if step is None:
    return load.load(path, model, param_dtype="float32")
  return orbax_step.read(step, model)


def _size(held: weights.Weights) -> int:
  return sum(
    math.prod(weight.shape) * weight.dtype.itemsize for weight in held.values()
  )


def _tell_plan(
  origin: str, out: pathlib.Path, what: str, num_bytes: int
) -> None:
  print(f"From {origin}")
  print(f"to {out}: {what}, {num_bytes:,} bytes of weights;")
  print(f"{target.free_bytes(out):,} bytes are free there.")


def _is_done(
  out: pathlib.Path, model: decoder.Model, wanted: weights.Weights
) -> bool:
  """Tells whether a target already holds what would be written."""
  there = _build_if_computed(out)
  if there is None or there.config != model.config:
    return False
  with progress.telling("Compared with what is there", _size(wanted)) as tell:
    found = verify.differences(wanted, _weights(out, model), tell)
  if not found:
    print("It is done already, bit for bit.")
  return not found


def _different(
  left: pathlib.Path, right: pathlib.Path, names: Sequence[str]
) -> errors.CheckpointError:
  more = f" and {len(names) - _MAX_TOLD} more" * (len(names) > _MAX_TOLD)
  return errors.CheckpointError(
    f"{len(names)} tensors or settings differ.",
    where=f"{left} and {right}",
    why=", ".join(names[:_MAX_TOLD]) + more,
    fix="Convert again from the one you trust.",
  )
