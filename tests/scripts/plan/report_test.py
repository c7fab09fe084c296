# SPDX-License-Identifier: Apache-2.0
"""Tests plans of real model shapes from a config.json, and their errors."""

import collections
import functools
import json
import os
import re
import shutil

import jax
import pytest

from configs.run import teacher_gkd, teacher_rcl, teacher_sft
from scripts.plan import report
from tests import processes

_QWEN = {
  "model_type": "qwen3",
  "head_dim": 128,
  "max_position_embeddings": 40960,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1_000_000,
  "tie_word_embeddings": False,
}


def _shape(model_type, vocab, width, mlp, layers, heads):
  fields = {**_QWEN, "model_type": model_type}
  if model_type == "llama":
    fields["rope_theta"] = 500_000
  return {
    **fields,
    "vocab_size": vocab,
    "hidden_size": width,
    "intermediate_size": mlp,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": 8,
  }


_SHAPES = {
  "qwen3_8b": _shape("qwen3", 151936, 4096, 12288, 36, 32),
  "qwen2.5_32b": _shape("qwen2", 152064, 5120, 27648, 64, 40),
  "llama_70b": _shape("llama", 128256, 8192, 28672, 80, 64),
}


def _simulate(free):
  """Simulates, in the job, the free bytes of a disk and a missing GPU."""
  usage = collections.namedtuple("usage", "total used free")
  shutil.disk_usage = lambda _: usage(free, 0, free)
  # Must be ignored: a plan does not initialize an accelerator.
  jax.config.update("jax_platforms", "cuda")


def _plan(recipe, *options, free=1 << 60):
  config = {"sft": "teacher_sft", "grpo": "teacher_rcl", "gkd": "teacher_gkd"}
  job = processes.Job(
    f"train_{recipe}",
    [f"--config=configs/run/{config[recipe]}.py", *options],
    environment={**os.environ, "JAX_PLATFORMS": "cuda"},
    split=True,
    prepare=functools.partial(_simulate, free),
  )
  out, err = job.communicate(timeout=300)
  return job.returncode, out, err


def _write(directory, fields):
  directory.mkdir()
  (directory / "config.json").write_text(json.dumps(fields))
  return directory


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "devices", "parameters", "most"),
  [
    # Float32, over all devices: 8.19, 32.8 and 70.6 billion parameters.
    ("qwen3_8b", "8x80GiB", 3.82, 80),
    ("qwen2.5_32b", "64x80GiB", 1.91, 80),
    ("llama_70b", "256x80GiB", 1.03, 80),
  ],
)
def test_a_config_alone_is_enough_to_plan(
  tmp_path, name, devices, parameters, most
):
  model = _write(tmp_path / "model", _SHAPES[name])
  number = int(devices.partition("x")[0])
  code, out, err = _plan(
    "sft",
    f"--workdir={tmp_path / 'run'}",
    f"--config.model.path={model}",
    "--config.packing.length=4096",
    f"--config.batch.size={number}",
    f"--plan={devices}",
  )
  assert code == 0, out + err
  sizes = {
    line[1]: float(line[2])
    for line in re.finditer(r"^  (.+?) +([\d.]+)  ", out, re.MULTILINE)
  }
  assert sizes["parameters"] == pytest.approx(parameters, abs=0.01)
  assert sizes["optimizer"] == pytest.approx(2 * parameters, abs=0.01)
  assert sizes["parameters"] < sizes["peak"] < most
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_plan_counts_the_bytes_of_a_teacher(tmp_path):
  fields = _shape("qwen2", 151936, 896, 4864, 4, 14)
  policy = _write(tmp_path / "policy", {**fields, "num_key_value_heads": 2})
  teacher = _write(
    tmp_path / "teacher", _shape("qwen2", 152064, 2048, 11008, 8, 16)
  )
  code, out, err = _plan(
    "gkd",
    f"--workdir={tmp_path / 'run'}",
    f"--config.model.path={policy}",
    f"--config.teacher.path={teacher}",
    "--config.batch.num_prompts=8",
    "--config.packing.length=1024",
    "--plan=8xH100",
  )
  assert code == 0, out + err
  sizes = {
    line[1]: float(line[2])
    for line in re.finditer(r"^  (.+?) +([\d.]+)  ", out, re.MULTILINE)
  }
  # In bfloat16, over all devices: 1.26 billion parameters.
  assert sizes["teacher"] == pytest.approx(0.294, abs=0.006)
  assert sizes["sampler"] < sizes["parameters"]
  # 0.52 and 1.26 billion weights would take longer than what is left out.
  found = re.search(r"Sampling at full memory bandwidth: ([\d.]+) s per", out)
  assert 0.0 < float(found[1]) < 10.0
  assert re.search(r"peak +[\d.]+  \d+% of [\d.]+ GiB, which is 75% of", out)


def test_a_plan_that_does_not_fit_suggests_a_change_that_does(tmp_path):
  model = _write(tmp_path / "model", _SHAPES["qwen3_8b"])
  options = (
    f"--workdir={tmp_path / 'run'}",
    f"--config.model.path={model}",
    "--config.packing.length=2048",
    "--config.batch.size=32",
    "--config.batch.per_device=0",
    "--plan=8x24GiB",
  )
  code, out, err = _plan("sft", *options)
  assert code == 2
  (change,) = re.findall(r"fix  : Set (.+)\.", err)
  assert f"fits  {change}" in out
  # The disk of the machine that plans need not be that of the run.
  code, out, err = _plan("sft", *options, *change.split(), free=0)
  assert code == 0, out + err
  assert re.search(r"^warn +disk .* 0.00 GiB free", out, re.MULTILINE)


@pytest.mark.parametrize("recipe", [teacher_sft, teacher_rcl, teacher_gkd])
@pytest.mark.parametrize("variant", ["full", "smoke"])
def test_every_change_of_a_plan_is_listed_once(recipe, variant):
  changes = list(report._alternatives(recipe.get_config(variant)))
  assert {} not in changes
  assert all(changes.count(change) == 1 for change in changes)
