# SPDX-License-Identifier: Apache-2.0
"""Tests the planned memory of a run against devices and across settings."""

import jax
import pytest

from atlas_jax import sharding
from atlas_jax.models import quantized
from configs.run import teacher_rcl
from conversion import load
from rollout import jax_sampler
from scripts.job import components
from scripts.plan import memory
from tests import tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  directory = tmp_path_factory.mktemp("memory")
  tiny.write_talker(directory / "model", num_hidden_layers=2)
  config = teacher_rcl.get_config()
  config.model.path = config.student.path = str(directory / "model")
  config.mesh.update(data=2, fsdp=2, tensor=2)
  config.sampling.teach.max_completion_tokens = 32
  config.sampling.solve.max_completion_tokens = 16
  return config


def _need(config, **changes):
  changed = memory.with_changes(
    config, {name.replace("__", "."): v for name, v in changes.items()}
  )
  shape, _ = load.read_config(load.resolve(config.model.path))
  described = memory.describe(changed, shape, prompt_tokens=64)
  return memory.need(described, changed, prompt_tokens=64)


def test_planned_sampler_bytes_match_the_devices(config):
  mesh = sharding.make_mesh(**config.mesh)
  opened = components.open_model(mesh, **config.model)
  sampler = jax_sampler.JaxSampler(
    opened.model, opened.params, mesh=mesh, stop_token_ids=[2], max_rows=8
  )
  planned = _need(config).resident
  for device in jax.devices():
    held = [
      sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(params)
        for shard in leaf.addressable_shards
        if shard.device == device
      )
      for params in (opened.params, sampler._params)
    ]
    assert held == [planned["parameters"], planned["sampler"]]


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_planned_bytes_of_a_quantized_base_match_the_devices(
  tmp_path, config, kind
):
  tiny.write_talker(
    tmp_path / "model",
    num_hidden_layers=2,
    hidden_size=128,
    intermediate_size=128,
    head_dim=32,
  )
  config = memory.with_changes(
    config,
    {
      "model.path": str(tmp_path / "model"),
      "model.param_dtype": kind,
      "lora.rank": 2,
    },
  )
  mesh = sharding.make_mesh(**config.mesh)
  opened = components.open_model(mesh, **config.model)
  sampler = jax_sampler.JaxSampler(
    opened.model, opened.params, mesh=mesh, stop_token_ids=[2], max_rows=8
  )
  need = _need(config)
  for device in jax.devices():
    held = [
      sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(params)
        for shard in leaf.addressable_shards
        if shard.device == device
      )
      for params in (opened.params, sampler._params)
    ]
    assert held == [need.resident["frozen base"], need.resident["sampler"]]
  whole = need.resident["sampler"]
  assert need.phases["push"] == {"merged weights": whole, "new sampler": whole}
  floats = _need(config, model__param_dtype="bfloat16")
  assert need.resident["frozen base"] < 0.7 * floats.resident["frozen base"]
  # Of a base that is not quantized, only the kernels with adapters are copied.
  assert floats.phases["push"]["new sampler"] == whole
  merged = floats.phases["push"]["merged weights"]
  assert 0 < merged < floats.resident["frozen base"]


def test_every_suggested_change_lowers_its_bytes(config):
  before = _need(config)
  assert set(before.phases) == {"update", "sampling", "push"}
  after = _need(config, offload__optimizer=True, offload__reference=True)
  assert "reference" not in after.resident
  counts = after.resident["optimizer"]  # Update counts stay on the devices.
  assert counts < 64
  moved = before.resident["optimizer"] + before.resident["reference"]
  assert after.on_host == moved - counts
  at_once = _need(config, batch__per_device=0)
  update = sum(before.phases["update"].values())
  assert sum(at_once.phases["update"].values()) > update
  fewer_rows = _need(config, sampler__max_rows=8)
  assert (
    fewer_rows.phases["sampling"]["KV cache"]
    < before.phases["sampling"]["KV cache"]
  )
  thinking = _need(config, roles__student__max_thinking_tokens=1024)
  assert (
    thinking.phases["sampling"]["KV cache"]
    > before.phases["sampling"]["KV cache"]
  )
  on_servers = _need(config, rollout__backend="http")
  assert "sampling" not in on_servers.phases
  assert not {"student", "sampler"} & on_servers.resident.keys()
  low = _need(config, reference__dtype="bfloat16")
  assert 2 * low.resident["reference"] == before.resident["reference"]
  ahead = _need(config, overlap__max_staleness=1)
  assert ahead.peak == sum(before.resident.values()) + sum(
    sum(before.phases[name].values()) for name in ("update", "sampling")
  )
  adapters = _need(config, lora__rank=2)
  assert "reference" not in adapters.resident
  assert adapters.resident["optimizer"] < before.resident["optimizer"] / 5
