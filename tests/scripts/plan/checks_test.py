# SPDX-License-Identifier: Apache-2.0
"""Tests the checks of files, data, servers and disk before a run."""

import json
import shutil
import socket

import pytest

from configs.run import teacher_gkd, teacher_rcl, teacher_sft
from scripts.plan import checks, memory
from tests import tiny

_SHAPE = {"num_hidden_layers": 1, "max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  directory = tmp_path_factory.mktemp("plan")
  tiny.write_talker(directory / "model", **_SHAPE)
  rows = [
    {"question": "2 + " * i + "2?", "solution": "4", "answer": "4"}
    for i in range(1, 41)
  ]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (directory / "rows.jsonl").write_text(text)
  return directory


def _sft(files):
  config = teacher_sft.get_config()
  config.model.path = str(files / "model")
  config.data.path = str(files / "rows.jsonl")
  config.packing.length = 256
  config.batch.size = 2
  return config


def _grpo(files):
  config = teacher_rcl.get_config()
  config.model.path = config.student.path = str(files / "model")
  config.data.path = str(files / "rows.jsonl")
  return config


def _gkd(files):
  config = teacher_gkd.get_config()
  config.model.path = config.teacher.path = str(files / "model")
  config.data.path = str(files / "rows.jsonl")
  config.packing.length = 256
  config.sampling.complete.max_completion_tokens = 8
  config.batch.num_prompts = 4
  return config


def _status(facts):
  return {check.name: check.status for check in facts.checks}


def test_conversations_are_packed_as_in_training(files):
  facts = checks.run(_sft(files))
  assert set(_status(facts).values()) == {"ok"}
  assert facts.steps_per_epoch > 0
  assert 128 < facts.tokens_per_row <= 256
  assert list(files.rglob("quarantine.jsonl")) == []


def test_rows_without_a_length_fill_the_context(files):
  config = _sft(files)
  config.packing.length = 0
  facts = checks.run(config)
  assert set(_status(facts).values()) == {"ok"}
  assert facts.steps_per_epoch == 1
  assert 256 < facts.tokens_per_row <= 4096


def test_gkd_rows_are_counted_with_sampled_completions(files, tmp_path):
  config = _gkd(files)
  facts = checks.run(config)
  assert set(_status(facts).values()) == {"ok"}
  assert {"teacher", "one tokenizer", "data"} <= set(_status(facts))
  assert facts.steps_per_epoch == 9  # Of 36 rows; 4 are held out.
  longest = memory.longest_row(config, facts.prompt_tokens)
  assert 100 < longest <= 256
  assert facts.tokens_per_row < longest
  # A teacher with other token ids fails the check.
  path = shutil.copytree(files / "model", tmp_path / "other") / "tokenizer.json"
  tokenizer = json.loads(path.read_text())
  vocabulary = tokenizer["model"]["vocab"]
  vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
  path.write_text(json.dumps(tokenizer))
  config.teacher.path = str(tmp_path / "other")
  assert _status(checks.run(config))["one tokenizer"] == "FAIL"
  config.teacher.path = config.model.path
  # Without sampling, rows hold the completions of the data: two tokens.
  config.completions.on_policy_fraction = 0.0
  unsampled = checks.run(config)
  assert memory.longest_row(config, unsampled.prompt_tokens) == longest - 6
  assert not memory.is_sampled(config)


def test_the_longest_question_is_counted_with_its_template(files):
  facts = checks.run(_grpo(files))
  assert set(_status(facts).values()) == {"ok"}
  config = _grpo(files)
  config.data.max_rows = 20
  shorter = checks.run(config)
  assert 40 < shorter.prompt_tokens < facts.prompt_tokens
  assert facts.steps_per_epoch is None


def test_a_config_alone_leaves_other_files_absent(files, tmp_path):
  (tmp_path / "model").mkdir()
  source = files / "model/config.json"
  (tmp_path / "model/config.json").write_text(source.read_text())
  config = _sft(files)
  config.model.path = str(tmp_path / "model")
  facts = checks.run(config)
  assert facts.shape is not None
  status = _status(facts)
  assert status.pop("model") == "ok"
  assert set(status.values()) == {"absent"}


def _break_data(directory, config):
  (directory / "broken.jsonl").write_text("{\n" * 20)
  config.data.path = str(directory / "broken.jsonl")


def _break_model(directory, config):
  del directory
  config.model.path = "/nowhere/at/all"


def _break_weights(directory, config):
  fields = tiny.fields("qwen2", **_SHAPE, hidden_size=24, vocab_size=1024)
  (directory / "config.json").write_text(json.dumps(fields))
  (directory / "model.safetensors").write_bytes(b"\0" * 64)
  config.model.path = str(directory)


def _break_length(directory, config):
  del directory
  config.packing.length = 8192


@pytest.mark.parametrize(
  ("damage", "name"),
  [
    (_break_data, "data"),
    (_break_model, "model"),
    (_break_weights, "weights of the model"),
    (_break_length, "data"),
  ],
)
def test_invalid_files_fail_with_a_fix(files, tmp_path, damage, name):
  config = _sft(files)
  damage(tmp_path, config)
  failed = [c for c in checks.run(config).checks if c.status == "FAIL"]
  assert [check.name for check in failed] == [name]
  assert failed[0].fix


def test_ignored_fields_are_ignored_in_checks_and_sizes(files, tmp_path):
  shutil.copytree(files / "model", tmp_path / "model")
  path = tmp_path / "model/config.json"
  fields = json.loads(path.read_text()) | {"final_logit_softcapping": 30.0}
  path.write_text(json.dumps(fields))
  config = _gkd(files)
  config.model.path = config.teacher.path = str(tmp_path / "model")
  found = checks.run(config)
  assert [_status(found)[name] for name in ("model", "teacher")] == ["FAIL"] * 2
  for section in (config.model, config.teacher):
    section.ignore_fields = ("final_logit_softcapping",)
  found = checks.run(config)
  assert "FAIL" not in _status(found).values()
  described = memory.describe(config, found.shape, prompt_tokens=64)
  assert memory.need(described, config, prompt_tokens=64)


def test_a_server_that_does_not_answer_fails(files):
  with socket.socket() as server:  # The port is closed afterwards.
    server.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
  config = _grpo(files)
  config.rollout.backend = "http"
  config.rollout.policy_urls = config.rollout.student_urls = (url,)
  status = _status(checks.run(config))
  assert status["server of the policy"] == "FAIL"
  assert status["server of the student"] == "FAIL"
  assert status["data"] == "ok"


def test_the_disk_of_a_missing_workdir_is_checked(tmp_path):
  workdir = tmp_path / "new/run"
  assert checks.disk(workdir, 1).status == "ok"
  full = checks.disk(workdir, 1 << 60)
  assert full.status == "warn"
  assert "--config.checkpoint.keep" in full.fix
  assert str(tmp_path) in full.found
  assert not workdir.exists()
