# SPDX-License-Identifier: Apache-2.0
"""Schedules against transformers."""

import numpy as np
import pytest

from atlas_jax.train import schedule

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_NUM_UPDATES, _NUM_WARMUP, _NUM_DECAY, _RATE = 40, 6, 10, 3e-3


def _reference(name, **options):
  optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=_RATE)
  scheduler = transformers.get_scheduler(
    name,
    optimizer,
    num_warmup_steps=_NUM_WARMUP,
    num_training_steps=_NUM_UPDATES,
    scheduler_specific_kwargs=options,
  )
  rates = []
  for _ in range(_NUM_UPDATES + 1):
    rates.append(scheduler.get_last_lr()[0])
    optimizer.step()
    scheduler.step()
  return np.array(rates)


@pytest.mark.parametrize(
  ("name", "theirs", "options"),
  [
    ("constant", "constant_with_warmup", {}),
    ("linear", "linear", {}),
    ("cosine", "cosine", {}),
    (
      "wsd",
      "warmup_stable_decay",
      {"num_decay_steps": _NUM_DECAY, "decay_type": "linear"},
    ),
  ],
)
def test_rates_match_transformers(name, theirs, options):
  rate = schedule.make(
    learning_rate=_RATE,
    schedule=name,
    warmup_fraction=0.0,
    warmup_steps=_NUM_WARMUP,
    decay_fraction=_NUM_DECAY / _NUM_UPDATES if name == "wsd" else 0.0,
    num_steps=_NUM_UPDATES,
  )
  rates = np.array([rate(i) for i in range(_NUM_UPDATES)])
  expected = _reference(theirs, **options)
  # Theirs starts at zero, so that the first update does nothing; ours starts
  # one update later in the warmup.
  np.testing.assert_allclose(
    rates[:_NUM_WARMUP], expected[1 : _NUM_WARMUP + 1], rtol=1e-6
  )
  np.testing.assert_allclose(
    rates[_NUM_WARMUP:], expected[_NUM_WARMUP:-1], rtol=1e-4, atol=1e-9
  )
