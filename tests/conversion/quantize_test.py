# SPDX-License-Identifier: Apache-2.0
"""Kernels are quantized while they are read, to the same bits on any mesh."""

import concurrent.futures

import jax
import numpy as np
import pytest

from atlas_jax import errors, sharding
from atlas_jax.models import lora, quantized
from conversion import load, quantize, rules, shards
from tests import tiny


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Returns a function from a family to its directory and model."""
  made = {}

  def write(family):
    if family not in made:
      directory = tmp_path_factory.mktemp("quantize") / family
      model, params = tiny.write_checkpoint(
        directory, family, num_hidden_layers=2, **tiny.blocks(family)
      )
      made[family] = directory, model, params
    return made[family]

  return write


def _load(directory, model, kind, mesh=None):
  described = load.describe(model, kind)
  return load.load(
    directory,
    model,
    param_dtype=kind,
    shardings=mesh and sharding.of_params(mesh, described),
  )


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize(
  ("family", "sizes"),
  [
    ("qwen3", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("phi3", {"context": 2, "tensor": 2}),
    ("qwen3_moe", {"expert": 2, "tensor": 2}),
  ],
)
def test_bits_do_not_depend_on_the_mesh(written, family, sizes, kind):
  directory, model, _ = written(family)
  one = _load(directory, model, kind)
  mesh = tiny.mesh(**sizes)
  many = _load(directory, model, kind, mesh)
  jax.tree.map(np.testing.assert_array_equal, many, one)
  places = sharding.of_params(mesh, load.describe(model, kind))
  assert jax.tree.map(lambda leaf: leaf.sharding, many) == places
  shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), many)
  assert shapes == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), load.describe(model, kind)
  )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_adapters_over_a_quantized_base_are_merged(written, family):
  directory, model, params = written(family)
  target = "attention/[qkvo]"
  settings = lora.Lora(rank=2, alpha=4.0, targets=(target,))
  adapted = lora.adapt(model, settings)
  adapters = jax.tree.map(
    lambda leaf: 0.1 * jax.numpy.ones(leaf.shape),
    lora.only(adapted.abstract_params),
  )
  whole = {}
  for kind, bound in (("int8", 0.01), ("nf4", 0.11)):
    base = _load(directory, model, kind)
    whole[kind] = quantized.whole(base, np.dtype(np.float32))
    for (path, kernel), (_, rounded) in zip(
      rules.flatten(params), rules.flatten(whole[kind]), strict=True
    ):
      gap = np.linalg.norm(rounded - kernel) / np.linalg.norm(kernel)
      assert gap < bound, path
  batch = tiny.batch(model)
  logits = jax.jit(adapted.logits)(lora.join(base, adapters), *batch)
  merged = lora.merge(whole["nf4"], adapters, settings.scale)
  expected = jax.jit(model.logits)(merged, *batch)
  np.testing.assert_allclose(logits, expected, atol=5e-4)


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize(
  ("path", "inputs"), [("attention/q/kernel", 128), ("attention/o/kernel", 4)]
)
def test_part_of_the_inputs_quantizes_to_the_same_bits(
  written, path, inputs, kind
):
  """Simulates a host that owns the second half of a kernel's inputs."""
  directory, model, _ = written("qwen3")
  path = f"layers/{path}"
  parts = {p.index: p for p in rules.pieces(model) if p.rule.path == path}
  described = load.describe(model, kind)["layers"]["attention"]
  name = path.split("/")[2]
  kernel = quantize.Kernel(path, parts, described[name]["kernel"])
  whole = _load(directory, model, kind)["layers"]["attention"][name]["kernel"]
  layers, _, *others = map(range, kernel.shape)
  hull = (layers, range(inputs // 2, inputs), *others)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    got = quantize._read(
      kernel, hull, load.open_tensors(directory, model), pool
    )
  for part, block in got.items():
    # A scale of all inputs is the same for each part of them.
    half = whole[part][:, whole[part].shape[1] // 2 :]
    np.testing.assert_array_equal(block, half)


def test_shared_parts_of_a_kernel_are_quantized_once(written, monkeypatch):
  directory, model, params = written("qwen3")
  rounded = []
  quantize_rows = quantize._quantize

  def counted(rows_XI, kind, block):
    rounded.append(rows_XI.size)
    return quantize_rows(rows_XI, kind, block)

  monkeypatch.setattr(quantize, "_quantize", counted)
  kernels = [
    leaf.size
    for path, leaf in rules.flatten(params)
    if quantized.last_input(path) is not None
  ]
  for kind in quantized.KINDS:
    rounded.clear()
    _load(directory, model, kind, tiny.mesh(data=2, fsdp=2, tensor=1))
    assert sum(rounded) == sum(kernels)
  # If heads are split, each output needs the inputs of all devices.
  rounded.clear()
  _load(directory, model, "int8", tiny.mesh(fsdp=2, tensor=2))
  assert sum(rounded) == sum(kernels)


def test_only_a_chunk_of_rows_is_float_at_a_time(written, monkeypatch):
  directory, model, _ = written("qwen3")
  expected = _load(directory, model, "nf4")
  monkeypatch.setattr(quantize, "_CHUNK", 128 * 3)
  sizes = []
  quantize_rows = quantize._quantize

  def seen(rows_XI, kind, block):
    sizes.append(len(rows_XI))
    return quantize_rows(rows_XI, kind, block)

  monkeypatch.setattr(quantize, "_quantize", seen)
  got = _load(directory, model, "nf4")
  assert max(sizes) == 3
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_non_finite_value_is_rejected_by_name(tmp_path):
  model, _ = tiny.write_checkpoint(
    tmp_path / "hf", "qwen2", num_hidden_layers=1, **tiny.blocks("qwen2")
  )
  name = "model.layers.0.mlp.up_proj.weight"
  tensor = shards.open_directory(tmp_path / "hf")[name]
  with tensor.file.open("r+b") as file:
    file.seek(tensor.begin)
    file.write(np.float32(np.inf).tobytes())
  with pytest.raises(errors.CheckpointError) as caught:
    _load(tmp_path / "hf", model, "nf4")
  assert caught.value.where == name


def test_missing_cpu_backend_is_an_error_with_a_fix(written, monkeypatch):
  directory, model, _ = written("qwen3")

  def fail(backend):
    raise RuntimeError(f"Unknown backend {backend}")

  monkeypatch.setattr(jax, "local_devices", fail)
  with pytest.raises(errors.ConfigError, match="quantized to nf4") as caught:
    _load(directory, model, "nf4")
  assert "JAX_PLATFORMS" in caught.value.where
