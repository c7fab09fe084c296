# SPDX-License-Identifier: Apache-2.0
"""Scores match the model's log-probabilities, in any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import sharding, types
from atlas_jax.train import score
from tests import tiny


def _scorer(model, params, max_rows=4):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  params = jax.device_put(
    params, sharding.of_params(mesh, model.abstract_params)
  )
  return score.Scorer(
    model, params, mesh=mesh, max_rows=max_rows, chunk_tokens=16
  )


@pytest.fixture(scope="module")
def world():
  model = tiny.build(
    "qwen2",
    vocab_size=40,
    hidden_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
  )
  rng = np.random.default_rng(0)
  pairs = [
    (
      types.Prompt(f"{i}", "", tuple(rng.integers(0, 40, 1 + i % 5).tolist())),
      tuple(rng.integers(0, 40, 1 + 3 * i % 11).tolist()),
    )
    for i in range(3)
  ]
  prompts, completions = zip(*pairs, strict=True)
  return model, tiny.params_of(model), prompts, completions


def _naive(model, params, prompt, completion, temperature):
  tokens = jnp.asarray([[*prompt.token_ids, *completion]])
  hidden = model.hidden(
    params, tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)
  )
  logits = hidden[0] @ model.head(params) / temperature
  logprobs = jax.nn.log_softmax(logits)
  start = len(prompt.token_ids)
  return [
    float(logprobs[start + i - 1, token]) for i, token in enumerate(completion)
  ]


def test_scores_are_the_models_log_probabilities(world):
  model, params, prompts, completions = world
  scorer = _scorer(model, params, max_rows=2)  # Two batches.
  scores = scorer(prompts, completions, temperature=0.7)
  for prompt, completion, found in zip(
    prompts, completions, scores, strict=True
  ):
    expected = _naive(model, params, prompt, completion, 0.7)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_scores_do_not_depend_on_the_batch(world):
  model, params, prompts, completions = world
  scorer = _scorer(model, params)
  together = scorer(prompts, completions, temperature=1.0)
  alone = scorer(prompts[1:2], completions[1:2], temperature=1.0)
  np.testing.assert_allclose(alone[0], together[1], atol=1e-5)
  assert scorer([], [], temperature=1.0) == []


def test_a_completion_beyond_the_context_has_no_score(world):
  model, params, prompts, completions = world
  long = tuple(range(40)) + tuple(range(40))
  scores = _scorer(model, params)(
    prompts[:2], [long, completions[1]], temperature=1.0
  )
  assert scores[0] is None
  assert len(scores[1]) == len(completions[1])
