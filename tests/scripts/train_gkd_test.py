# SPDX-License-Identifier: Apache-2.0
"""Tests GKD from the command line: adapters, exports and tokenizers."""

import json
import re

import pytest

from tests import processes, tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  home = tmp_path_factory.mktemp("home")
  tiny.write_talker(home / "policy", num_hidden_layers=1)
  tiny.write_talker(home / "teacher", family="qwen3", hidden_size=32)
  rows = [
    {"question": f"What is {i} + {i}?", "solution": f"It is {2 * i}."}
    for i in range(12)
  ]
  (home / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return home


def _run(home, workdir, *more):
  job = processes.Job(
    "train_gkd",
    [
      "--config=configs/run/teacher_gkd.py:smoke",
      f"--workdir={workdir}",
      "--config.world.directory=",
      f"--config.model.path={home}/policy",
      f"--config.teacher.path={home}/teacher",
      f"--config.data.path={home}/data.jsonl",
      "--config.batch.num_prompts=4",
      "--config.sampling.complete.max_completion_tokens=8",
      "--config.completions.on_policy_fraction=1.0",
      "--config.loop.num_steps=2",
      "--config.loop.log_every=1",
      *more,
    ],
  )
  return processes.end(job)


@pytest.mark.slow
def test_adapters_are_exported_merged_and_separately(home, tmp_path):
  options = ("--config.lora.rank=2", "--config.lora.alpha=4.0")
  workdir = tmp_path / "run"
  code, text = _run(home, workdir, *options)
  assert code == 0, text
  logged = (workdir / "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in logged.splitlines()]
  assert [row["step"] for row in rows if "loss" in row] == [1, 2]
  assert "eval/divergence" in rows[-1]
  card = (workdir / "export/README.md").read_text()
  facts = dict(re.findall(r"(?m)^- ([\w ]+): (.+)$", card))
  assert facts["Base model"] == f"{home}/policy"
  assert facts["Recipe"] == "GKD"
  assert facts["Teacher"] == f"{home}/teacher"
  assert re.fullmatch("[0-9a-f]{64}", facts["Data fingerprint"])
  # Only adapted tensors differ from the base.
  changed = tiny.differing(home / "policy", workdir / "export")
  assert changed
  assert all("proj" in name for name in changed)
  assert (workdir / "adapter/adapter_config.json").exists()

  # A run that starts from the adapters samples with them from its first step,
  # also with quantized base and teacher.
  code, text = _run(
    home,
    tmp_path / "more",
    *options,
    f"--config.lora.path={workdir}/adapter",
    "--config.model.param_dtype=int8",
    "--config.teacher.param_dtype=int8",
    "--config.agreement.max_prob_error=1.02",
    "--config.loop.num_steps=1",
  )
  assert code == 0, text


def test_different_tokenizers_exit_with_code_2(home, tmp_path):
  other = tmp_path / "other"
  tiny.write_talker(other, num_hidden_layers=1)
  path = other / "tokenizer.json"
  fields = json.loads(path.read_text())
  vocab = fields["model"]["vocab"]
  vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
  path.write_text(json.dumps(fields))
  code, text = _run(home, tmp_path / "run", f"--config.teacher.path={other}")
  assert code == 2, text
  assert "Policy and teacher have different tokenizers." in text
  assert "2 tokens have different ids: 'a'" in text
