# SPDX-License-Identifier: Apache-2.0
"""vLLM loads an export of every family and matches our model."""

import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import fakes, tiny

_ROOT = pathlib.Path(__file__).parents[2]
_PYTHON = _ROOT / ".venv-rollout/bin/python"
# vLLM's CPU attention requires a head size of at least 32, and its Qwen2 that
# num_attention_heads * head_dim equals hidden_size.
_SHAPE = {
  "vocab_size": 300,
  "hidden_size": 128,
  "intermediate_size": 96,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 32,
}
_OWN = {
  "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4},
  # vLLM supports only a tied head for Gemma 2, as all its checkpoints have.
  "gemma2": {"query_pre_attn_scalar": 32, "tie_word_embeddings": True},
  "gemma3_text": {"query_pre_attn_scalar": 32},
}
# With its completion each is longer than the attention window of 5.
_PROMPTS = ((5, 6, 7), (9, 10, 11, 12, 13, 14, 15, 16))

pytestmark = [
  pytest.mark.vllm,
  pytest.mark.slow,
  pytest.mark.skipif(
    not _PYTHON.exists(),
    reason="No .venv-rollout; run bash scripts/install_rollout.sh.",
  ),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Returns each family's model, parameters and vLLM's completions."""
  root = tmp_path_factory.mktemp("families")
  models = {}
  for family in tiny.FAMILIES:
    changes = {**_SHAPE, **_OWN.get(family, {})}
    models[family] = tiny.write_checkpoint(root / family, family, **changes)
    fakes.write_tokenizer(root / family)
  kept_out = ("XLA_FLAGS", "JAX_PLATFORMS")
  done = subprocess.run(
    [
      _PYTHON,
      "-m",
      "tests.vllm_greedy",
      json.dumps(_PROMPTS),
      *(root / family for family in models),
    ],
    cwd=_ROOT,
    env={k: v for k, v in os.environ.items() if k not in kept_out},
    capture_output=True,
    text=True,
    timeout=500,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  lines = [x for x in done.stdout.splitlines() if x.startswith('{"directory')]
  completions = {
    pathlib.Path(row["directory"]).name: row["completions"]
    for row in map(json.loads, lines)
  }
  return {family: (*models[family], completions[family]) for family in models}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_vllm_matches_our_model(written, family):
  model, params, completions = written[family]
  logits = jax.jit(model.logits)
  for prompt, completion in zip(_PROMPTS, completions, strict=True):
    token_ids, logprobs = zip(*completion, strict=True)
    tokens_BT = jnp.asarray([[*prompt, *token_ids]])
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    logits_BTV = logits(
      params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT)
    )
    ours_TV = jax.nn.log_softmax(logits_BTV[0, len(prompt) - 1 : -1])
    assert np.argmax(ours_TV, axis=-1).tolist() == list(token_ids)
    assert max(logprobs) < -0.05  # A model that ignores its input might pass.
    np.testing.assert_allclose(np.max(ours_TV, -1), logprobs, atol=1e-3)
