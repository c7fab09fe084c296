# SPDX-License-Identifier: Apache-2.0
"""A few shapes, known before the run, hold every batch."""

from absl import logging
import pytest

from atlas_jax import errors
from atlas_jax.train import batch_shapes
from configs.run import teacher_gkd, teacher_rcl
from tests import tiny


def _layout(**changes):
  settings = {
    "length": 192,
    "packed": True,
    "per_device": 48,
    "num_minibatches": 1,
    "num_shards": 1,
    "max_sequences": 128,
    "max_length": 192,
  }
  return batch_shapes.Layout(**{**settings, **changes})


@pytest.mark.parametrize(
  ("changes", "menu"),
  [
    # Shapes are (tokens, rows, microbatches).
    ({}, [(192, 48, 3)]),
    (
      {"max_length": 1000},
      [(192, 48, 3), (384, 24, 6), (768, 12, 11), (1024, 9, 15)],
    ),
    ({"max_length": 193, "per_device": 1}, [(192, 1, 128), (224, 1, 128)]),
    ({"per_device": 0, "num_shards": 8}, [(192, 128, 1)]),
    ({"per_device": 999, "num_shards": 8}, [(192, 128, 1)]),
    ({"per_device": 2, "num_shards": 8}, [(192, 16, 8)]),
    ({"max_sequences": 5, "num_shards": 4}, [(192, 8, 1)]),
    ({"max_sequences": 9, "num_minibatches": 4}, [(192, 3, 1)]),
    ({"length": 0, "max_length": 50}, [(32, 48, 3), (64, 24, 6)]),
  ],
)
def test_lengths_double_and_tokens_of_a_microbatch_are_bounded(changes, menu):
  assert list(_layout(**changes).menu) == menu


@pytest.mark.parametrize("per_device", [1, 3, 16, 100])
def test_a_shape_has_a_row_for_every_sequence(per_device):
  layout = _layout(
    per_device=per_device, num_shards=4, max_sequences=130, max_length=40_000
  )
  bound = max(per_device * 192, layout.menu[-1].length) * 4
  for shape in layout.menu:
    assert shape.num_rows * shape.num_microbatches >= layout.num_completions
    assert shape.num_rows % 4 == layout.num_completions % 4 == 0
    assert shape.num_rows * shape.length <= bound
  assert layout.num_completions == 132
  assert layout.menu[-1].length == 40_000


def test_the_limits_of_a_recipe_bound_its_menu():
  config, mesh = teacher_rcl.get_config("smoke"), tiny.mesh(fsdp=2)
  config.batch.num_minibatches = 2
  assert batch_shapes.of_grpo(config, mesh, max_positions=512).menu == (
    (192, 64, 1),
    (384, 48, 2),
    (512, 36, 2),
  )
  config.roles.policy.max_prompt_tokens = 200
  # With completions of up to 64 tokens.
  layout = batch_shapes.of_grpo(config, mesh, max_positions=512)
  assert [shape.length for shape in layout.menu] == [192, 288]
  layout = batch_shapes.of_grpo(config, mesh, max_positions=192)
  assert [shape.length for shape in layout.menu] == [192]

  config = teacher_gkd.get_config("full")
  menu = batch_shapes.of_gkd(config, mesh).menu
  assert menu == ((8192, 2, 128),)


def test_the_menu_is_logged(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, "info", lambda text, *x: lines.append(text % x))
  _layout(max_length=300).log()
  assert lines == [
    "Batches have one of 2 shapes, microbatches x rows x tokens: 3 x 48 x 192, "
    "5 x 28 x 320."
  ]


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("batch.per_device", -1),
    ("batch.num_minibatches", 0),
    ("packing.length", -1),
  ],
)
def test_an_invalid_layout_raises(name, value):
  with pytest.raises(errors.ConfigError, match=f"{name}={value}"):
    _layout(**{name.split(".")[1]: value})
