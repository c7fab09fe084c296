# SPDX-License-Identifier: Apache-2.0
"""lm-eval loads an export and computes the log-probabilities of our model."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tests import tiny

pytest.importorskip("torch")
pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

_ROWS = (
  {"question": "What is 1 + 1?", "choices": ["2", "3 or 4"], "answer": 0},
  {"question": "And 2 + 3?", "choices": ["1", "5 of them"], "answer": 1},
)
_TASK = """\
task: local
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def _measure(directory, model):
  """Runs a task on local data; returns the log-likelihood of each choice."""
  rows = directory / "rows.jsonl"
  rows.write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
  (directory / "local.yaml").write_text(_TASK.replace("ROWS", str(rows)))
  subprocess.run(
    [
      sys.executable,
      "-m",
      "lm_eval",
      "--model=hf",
      "--tasks=local",
      f"--model_args=pretrained={model},dtype=float32",
      "--device=cpu",
      f"--include_path={directory}",
      f"--output_path={directory}/out",
      "--log_samples",
      "--batch_size=1",
    ],
    env={
      **os.environ,
      **{"HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "cache")},
    },
    cwd=directory,
    check=True,
    timeout=300,
  )
  (path,) = (directory / "out").rglob("samples_local_*.jsonl")
  lines = path.read_text().splitlines()
  samples = sorted(map(json.loads, lines), key=lambda s: s["doc_id"])
  return [
    [float(choice[0]) for choice in sample["filtered_resps"]]
    for sample in samples
  ]


def test_lm_eval_matches_our_logprobs(tmp_path):
  model, params = tiny.write_talker(tmp_path / "hf", "qwen3")
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  logits = jax.jit(model.logits)

  measured = _measure(tmp_path, tmp_path / "hf")

  for row, choices in zip(_ROWS, measured, strict=True):
    for choice, got in zip(row["choices"], choices, strict=True):
      prompt = tokenizer.encode(row["question"])
      whole = tokenizer.encode(f"{row['question']} {choice}")
      tokens_BT = jnp.asarray([whole])
      positions_BT = jnp.arange(len(whole))[None]
      logits_BTV = logits(
        params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT)
      )
      logprobs_TV = jax.nn.log_softmax(logits_BTV[0, len(prompt) - 1 : -1])
      targets = np.asarray(whole[len(prompt) :])
      wanted = sum(logprobs_TV[np.arange(len(targets)), targets])
      assert wanted < -1.0
      np.testing.assert_allclose(got, wanted, atol=1e-3)
