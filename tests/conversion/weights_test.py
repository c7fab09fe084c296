# SPDX-License-Identifier: Apache-2.0
"""Arrays of a checkpoint are read once each, and few are held at a time."""

import gc
import time
import weakref

import pytest

from atlas_jax import checkpoint_format
from conversion import orbax_step, rules, weights
from tests import tiny


@pytest.mark.parametrize(("family", "num_held"), [("qwen3", 1), ("phi3", 3)])
def test_each_array_is_read_once_and_freed(
  tmp_path, monkeypatch, family, num_held
):
  model = tiny.build(family)
  checkpoint_format.write(
    tmp_path / "1", {"params": tiny.params_of(model)}, identity={}
  )
  read_one, paths = orbax_step.read_one, []
  alive, most = weakref.WeakValueDictionary(), []

  gc.freeze()  # Collections need not visit what the imports hold.

  def read(step, path):
    gc.collect()  # Frees the reference cycles of orbax.
    # Its threads may hold an array a little longer.
    for _ in range(100):
      if len(alive) < num_held:
        break
      time.sleep(0.02)
      gc.collect()
    most.append(len(alive))
    paths.append(path)
    alive[path] = array = read_one(step, path)
    return array

  monkeypatch.setattr(orbax_step, "read_one", read)
  for weight in weights.of_step(tmp_path / "1", model).values():
    weight.read()
  assert sorted(paths) == sorted(
    p for p, _ in rules.flatten(model.abstract_params)
  )
  assert max(most) == num_held - 1
