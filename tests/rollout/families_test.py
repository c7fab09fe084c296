# SPDX-License-Identifier: Apache-2.0
"""vLLM opens an export of every family, and writes what our model would."""

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
# vLLM's attention on a CPU wants heads of 32 and more, and its Qwen2 heads that
# fill the width.
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
  # vLLM knows no head of Gemma 2's own, nor has it one.
  "gemma2": {"query_pre_attn_scalar": 32, "tie_word_embeddings": True},
  "gemma3_text": {"query_pre_attn_scalar": 32},
}
# With its completion each is longer than the windows' 5.
_PROMPTS = ((5, 6, 7), (9, 10, 11, 12, 13, 14, 15, 16))

pytestmark = [
  pytest.mark.vllm,
  pytest.mark.slow,
  pytest.mark.skipif(
    not _PYTHON.exists(),
    reason="No .venv-rollout; bash scripts/install_rollout.sh makes it.",
  ),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Gives each family's model, parameters and what vLLM writes with them."""
  root = tmp_path_factory.mktemp("families")
  models = {}
  for family in tiny.FAMILIES:
    changes = {**_SHAPE, **_OWN.get(family, {})}
    models[family] = tiny.write_checkpoint(root / family, family, **changes)
    fakes.write_tokenizer(root / family)
  kept_out = ("XLA_FLAGS", "JAX_PLATFORMS")
  done = subprocess.run(
    [
      *(_PYTHON, "-m", "tests.vllm_greedy", json.dumps(_PROMPTS)),
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
def test_vllm_writes_what_our_model_would(written, family):
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
    assert max(logprobs) < -0.05  # Else a broken model would do as well.
    np.testing.assert_allclose(np.max(ours_TV, -1), logprobs, atol=1e-3)
