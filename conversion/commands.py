# SPDX-License-Identifier: Apache-2.0
"""Commands of `scripts.convert`: convert to and from Hugging Face, compare."""

from collections.abc import Collection, Sequence
import dataclasses
import functools
import math
import pathlib
import tempfile
from typing import Literal

import numpy as np

from atlas_jax import checkpoint_format, errors
from atlas_jax.models import decoder, lora, quantized
from conversion import (
  card,
  gguf_file,
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
_MAX_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags of a conversion; an empty `dtype` keeps the input's precision.

  `ignore_fields` names fields of config.json that are treated as absent.
  """

  source: str
  ignore_fields: Collection[str]
  dtype: Literal["", "float32", "bfloat16"]
  max_shard_bytes: int
  overwrite: bool
  merge: bool
  is_dry_run: bool
  with_logits: bool


def to_hf(origin: pathlib.Path, out: pathlib.Path, options: Options) -> None:
  """Writes the parameters of a checkpoint in Hugging Face format.

  Adapters are merged into their base, or written in PEFT format.

  Raises:
    errors.AtlasError: if an input or the target is invalid, or the files read
      back differ.
  """
  step = orbax_step.find(origin)
  if step is None:
    raise errors.CheckpointError(
      "No checkpoint found.",
      where=str(origin),
      why="It is not a step, a folder of steps or a workdir with steps.",
      fix="Pass the --workdir of a run that saved a checkpoint.",
    )
  if not options.source:
    raise errors.ConfigError(
      "--source is required to convert a checkpoint.",
      where="--source",
      why="A checkpoint holds neither a tokenizer nor the model's config.",
      fix="Set --source to the run's --config.model.path.",
    )
  source = load.resolve(options.source)
  model = _build(source, options.ignore_fields)
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
  _print_plan(f"{step} with {source}", out, f"{len(files)} files", num_bytes)
  wanted = weights.cast(stored, dtype)
  if not options.overwrite and _is_done(out, model, wanted):
    return
  save.check(
    out, model, source=source, dtype=dtype, overwrite=options.overwrite
  )
  if options.is_dry_run:
    return
  with progress.reporting("Read", _size(stored)) as advance:
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
  """Implements `to_hf` for a run that trained adapters."""
  abstract = lora.only(lora.adapt(model, settings).abstract_params)
  dtype = options.dtype or weights.dtype_of(
    weights.of_directory(source), source
  )
  num_bytes = save.num_bytes(model, dtype) if options.merge else 0
  _print_plan(f"{step} over {source}", out, f"rank {settings.rank}", num_bytes)
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
    about=_card(step, options),
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
  """Writes a directory and compares its logits with those of `params`."""
  num_bytes = save.num_bytes(model, dtype)
  with progress.reporting("Wrote and read back", num_bytes) as advance:
    save.save(
      out,
      params,
      model,
      source=source,
      dtype=dtype,
      max_shard_bytes=options.max_shard_bytes,
      about=_card(step, options),
      overwrite=options.overwrite,
      progress=advance,
    )
  print(save.describe_carried(source))
  if options.with_logits:
    gap = verify.logits_equal(out, params, model, tolerance=_TOLERANCE)
    print(f"Logits differ by at most {gap:.1e}.")
  print(f"Done: {out}")


def _card(step: pathlib.Path, options: Options) -> card.Card:
  """Returns the model card of a checkpoint."""
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
  """Adds a PEFT adapter to its base, with one tensor in memory at a time.

  Raises:
    errors.AtlasError: if an input or the target is invalid, or the files read
      back differ.
  """
  source = load.resolve(base)
  model = _build(source, options.ignore_fields)
  tensors = load.open_tensors(source, model)
  opened = peft_adapters.open_directory(adapter)
  peft_adapters.check_shapes(opened, model)
  held = weights.of_directory(source)
  dtype = options.dtype or weights.dtype_of(held, source)
  num_bytes = save.num_bytes(model, dtype)
  files = shards.layout(
    rules.shapes(model), dtype=dtype, max_shard_bytes=options.max_shard_bytes
  )
  _print_plan(f"{source} and {adapter}", out, f"{len(files)} files", num_bytes)
  fetch = peft_adapters.merging(opened, tensors, dtype)
  wanted = {
    name: weights.Weight(np.dtype(dtype), shape, functools.partial(fetch, name))
    for name, shape in rules.shapes(model).items()
  }
  about = card.Card(base=base, facts={"Adapter": str(adapter)})
  _write_weights(wanted, source, model, out, options, dtype, about)


def from_gguf(
  origin: pathlib.Path, out: pathlib.Path, options: Options
) -> None:
  """Writes a GGUF file in Hugging Face format, dequantized.

  One tensor is in memory at a time. By default, a file of bfloat16 matrices
  stays bfloat16, and all others become float32, which holds every dequantized
  value.

  Raises:
    errors.AtlasError: if the input or the target is invalid, or the files read
      back differ.
  """
  opened = gguf_file.open_file(origin)
  model = gguf_file.build(opened, options.ignore_fields)
  held = gguf_file.of_model(opened, model)
  stored = "bfloat16" if opened.kinds == ["BF16"] else "float32"
  dtype = options.dtype or stored
  files = shards.layout(
    rules.shapes(model), dtype=dtype, max_shard_bytes=options.max_shard_bytes
  )
  kinds = ", ".join(opened.kinds)
  num_bytes = save.num_bytes(model, dtype)
  _print_plan(f"{origin} ({kinds})", out, f"{len(files)} files", num_bytes)
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder)
    gguf_file.write_source(opened, source)
    about = card.Card(
      base="", facts={"GGUF file": origin.name, "Dequantized from": kinds}
    )
    wanted = weights.cast(held, dtype)
    _write_weights(wanted, source, model, out, options, dtype, about)


def _write_weights(
  wanted: weights.Weights,
  source: pathlib.Path,
  model: decoder.Model,
  out: pathlib.Path,
  options: Options,
  dtype: Literal["float32", "bfloat16"],
  about: card.Card,
) -> None:
  """Writes weights of precision `dtype`, unless the target holds them."""
  if not options.overwrite and _is_done(
    out, model, weights.cast(wanted, dtype)
  ):
    return
  save.check(
    out, model, source=source, dtype=dtype, overwrite=options.overwrite
  )
  if options.is_dry_run:
    return
  num_bytes = save.num_bytes(model, dtype)
  with progress.reporting("Wrote and read back", num_bytes) as advance:
    save.write(
      out,
      lambda name: wanted[name].read(),
      model,
      source=source,
      dtype=dtype,
      max_shard_bytes=options.max_shard_bytes,
      about=about,
      overwrite=options.overwrite,
      progress=advance,
    )
  print(save.describe_carried(source))
  print(f"Done: {out}")


def from_hf(origin: str, out: pathlib.Path, options: Options) -> None:
  """Writes a model in Hugging Face format as an orbax checkpoint.

  Raises:
    errors.AtlasError: if the input or the target is invalid, or the files read
      back differ.
  """
  source = load.resolve(origin)
  model = _build(source, options.ignore_fields)
  names = rules.shapes(model)
  held = weights.of_directory(source)
  dtype = options.dtype or weights.dtype_of(held, source)
  num_bytes = save.num_bytes(model, dtype)
  _print_plan(str(source), out, "an orbax checkpoint", num_bytes)
  # A tied head and tables computed from the config are not copied.
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
  with progress.reporting("Read", num_bytes) as advance:
    params = load.load(source, model, param_dtype=dtype, progress=advance)
  with target.writing(out) as partial:
    with progress.reporting("Wrote", num_bytes) as advance:
      orbax_step.write(partial, params, source=source)
      advance(num_bytes)
    del params  # Host memory may not hold a second copy.
    with progress.reporting("Read back", num_bytes) as advance:
      found = verify.differences(
        wanted, weights.of_step(partial, model), advance
      )
    if found:
      raise _different(source, out, [each.name for each in found])
  print(f"Done: {out}")


def verify_pair(
  left: pathlib.Path, right: pathlib.Path, options: Options
) -> None:
  """Compares two models in either format and prints the differences.

  A checkpoint is compared with a directory at the directory's precision: an
  export has the checkpoint's weights, rounded.

  Raises:
    errors.CheckpointError: if they differ, or one cannot be read.
  """
  ignored = options.ignore_fields
  known = [_build_if_computed(path, ignored) for path in (left, right)]
  if options.source:
    known.append(_build(load.resolve(options.source), ignored))
  # The checkpoint of a run has no config, so it uses the other side's model.
  a, b = (model or next(filter(None, known), None) for model in known[:2])
  held = [_weights(left, a), _weights(right, b)]
  is_step = [orbax_step.find(path) is not None for path in (left, right)]
  if is_step in ([True, False], [False, True]):
    step = is_step.index(True)
    held[step] = weights.rounded_like(held[step], held[1 - step])
  with progress.reporting("Compared", _size(held[0])) as advance:
    found = verify.differences(held[0], held[1], advance)
  changed = verify.config_differences(a, b) if a and b else []
  if not found and not changed:
    kinds = ", ".join(sorted({w.dtype.name for w in held[1].values()}))
    print(
      f"All tensors of {left} and {right} are equal, bit for bit ({kinds})."
    )
    return
  for line in (*changed, *verify.table(found)):
    print(line)
  shapes = [{n: w.shape for n, w in side.items()} for side in held]
  if options.with_logits and a and b and shapes[0] == shapes[1]:
    sides = (a, _params(left, a)), (b, _params(right, b))
    gap = verify.logit_gap(*sides)
    print(
      f"Logits differ by at most {gap.largest:.3g}, with a KL divergence of "
      f"{gap.divergence:.3g} nats."
    )
    print(verify.compare_layers(*sides))
  raise _different(left, right, [*changed, *(each.name for each in found)])


def _build(
  directory: pathlib.Path, ignore_fields: Collection[str]
) -> decoder.Model:
  config, _ = load.read_config(directory, ignore_fields=ignore_fields)
  return decoder.build(
    config, dtype="float32", attention="xla", remat="none", unroll=1
  )


def _build_if_computed(
  path: pathlib.Path, ignore_fields: Collection[str]
) -> decoder.Model | None:
  """Builds the model of a directory; None without a supported config."""
  place = orbax_step.find(path) or path
  try:
    if (place / "config.json").exists():
      return _build(place, ignore_fields)
  except errors.CheckpointError as error:
    print(f"Comparing tensors only: {error.what} ({error.where})")
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


def _print_plan(
  origin: str, out: pathlib.Path, what: str, num_bytes: int
) -> None:
  print(f"From {origin}")
  print(f"to {out}: {what}, {num_bytes:,} bytes of weights;")
  print(f"{target.free_bytes(out):,} bytes are free on that disk.")


def _is_done(
  out: pathlib.Path, model: decoder.Model, wanted: weights.Weights
) -> bool:
  """Returns whether the target already holds the weights to be written."""
  there = _build_if_computed(out, model.config.ignored_fields)
  if there is None or there.config != model.config:
    return False
  with progress.reporting("Compared with the target", _size(wanted)) as advance:
    found = verify.differences(wanted, _weights(out, model), advance)
  if not found:
    print("Already done: the target is equal, bit for bit.")
  return not found


def _different(
  left: pathlib.Path, right: pathlib.Path, names: Sequence[str]
) -> errors.CheckpointError:
  more = f" and {len(names) - _MAX_SHOWN} more" * (len(names) > _MAX_SHOWN)
  return errors.CheckpointError(
    f"{len(names)} tensors or settings differ.",
    where=f"{left} and {right}",
    why=", ".join(names[:_MAX_SHOWN]) + more,
    fix="Convert again from the directory that you trust.",
  )
