# SPDX-License-Identifier: Apache-2.0
"""Tests that a killed and resumed run matches an uninterrupted one bit for bit.

SIGKILL after a step leaves exactly the files on disk at that time. So the tests
copy the workdir of a run after each step and resume the copies.
"""

import hashlib
import json
import os
import random
import re
import shutil

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import orbax.checkpoint as ocp
import pytest

from atlas_jax import errors, sharding, types
from atlas_jax.data import sets
from atlas_jax.rewards import grading
from atlas_jax.train import gkd, grpo, loop, sft
from atlas_jax.train.telemetry import writer
from configs.run import teacher_gkd, teacher_rcl, teacher_sft
from scripts.job import components
from tests import tiny

_NUM_STEPS = 3
# Metrics that depend on the machine.
_TIMES = re.compile(
  r".*(seconds.*|time|_s)|memory/.*|num_compiles|goodput|.*tflops|mfu"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Returns a directory with two models and data for all recipes."""
  home = tmp_path_factory.mktemp("home")
  for i, name in enumerate(("policy", "student")):
    tiny.write_talker(home / name, num_hidden_layers=1 + i)
  rows = [
    {
      "question": f"{i} + {i}?",
      "answer": str(2 * i),
      "solution": "It is " + str(2 * i),
    }
    for i in range(6)
  ]
  (home / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  # Resumed runs reuse compiled programs.
  cached = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": str(home / "cache"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
  }
  old = {name: getattr(jax.config, name) for name in cached}
  _configure(cached)
  yield home
  _configure(old)


def _configure(settings):
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def _shorten(config, home):
  config.world.directory = ""
  config.model.path = str(home / "policy")
  config.data.path = str(home / "data.jsonl")
  config.loop.num_steps = _NUM_STEPS
  config.loop.log_every = 2
  config.loop.eval_every = 2
  config.loop.save_every = 1
  config.checkpoint.keep = 2
  config.batch.per_device = 1  # Accumulates gradients.
  # The learning rate changes with every update.
  config.schedule.schedule = "cosine"
  config.schedule.warmup_fraction = 0.5


def _opened(config, workdir, should_stop):
  """Opens base model, policy, parameters and arguments all recipes share."""
  mesh = jax.make_mesh(
    (1,) * len(sharding.AXES),
    sharding.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.AXES),
    devices=jax.devices()[:1],
  )
  base = components.open_model(mesh, **config.model)
  policy, params = components.open_policy(
    base, mesh, seed=config.seed, **config.lora
  )
  common = {
    "mesh": mesh,
    "config": config,
    "run": loop.Run(
      workdir, writer.Writer(workdir, ()), should_stop=should_stop
    ),
  }
  return base, policy, params, common


def _train_sft(home, workdir, should_stop):
  config = teacher_sft.get_config("smoke")
  _shorten(config, home)
  config.num_epochs = 0.0
  config.batch.size = 2
  config.packing.packed = False
  config.optimizer.name = "muon"
  workdir.mkdir(exist_ok=True)
  base, policy, params, common = _opened(config, workdir, should_stop)
  config.held_out.fraction = 0.3
  train_set, eval_set = sets.conversations(
    base.tokenizer,
    data=sets.Selection(**config.data),
    held_out=sets.HeldOut(**config.held_out),
    layout=sets.Layout(**config.packing),
    batch_size=config.batch.size,
    seed=config.seed,
    workdir=workdir,
  )
  sft.train(
    policy,
    params,
    train_set=train_set,
    eval_set=eval_set,
    **common,
  )


def _low_id_fraction(records):
  """Rewards the fraction of ids below 128, which varies for random models."""
  ids = [np.array(r.teacher_rollout.completion.token_ids) for r in records]
  return [types.Reward(float((each < 128).mean())) for each in ids]


def _train_grpo(home, workdir, should_stop):
  """Trains with overlapped sampling and a synced reference."""
  config = teacher_rcl.get_config("smoke")
  _shorten(config, home)
  config.student.path = str(home / "student")
  config.held_out = {"path": "", "fraction": 0.3}
  config.overlap.max_staleness = 1
  config.agreement.every_steps = 2 * _NUM_STEPS
  config.reference.sync_every = 2
  config.batch.num_questions = 2
  config.batch.mask_truncated = False
  config.groups.filter_equal = False
  config.sampling.teach.group_size = 2
  for phase in config.sampling.values():
    phase.max_completion_tokens = 8
  workdir.mkdir(exist_ok=True)
  base, policy, params, common = _opened(config, workdir, should_stop)
  mesh = common["mesh"]
  questions, held_out = sets.questions(
    sets.Selection(**config.data),
    sets.HeldOut(**config.held_out),
    batch_size=config.batch.num_questions,
    seed=config.seed,
    workdir=workdir,
  )
  student = components.open_model(mesh, **config.student)
  with components.open_protocol(base, student, mesh, config) as protocol:
    grpo.train(
      policy,
      params,
      protocol=protocol,
      grader=grading.by_rules(),
      reward_fn=_low_id_fraction,
      questions=questions,
      held_out=held_out,
      evaluation=components.evaluation_rollouts(protocol, config),
      **common,
    )


def _logged(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if not _TIMES.fullmatch(k)}
    for line in lines
  ]


def _digest(workdir):
  """Returns a digest of the last checkpoint of a run."""
  last = workdir / "checkpoints" / str(_NUM_STEPS)
  digest = hashlib.sha256((last / "host_state.json").read_bytes())
  state = ocp.StandardCheckpointer().restore(last.absolute() / "state")
  for path, leaf in jax.tree.leaves_with_path(state):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def _train_gkd(home, workdir, should_stop):
  """Distils on completions of both the policy and the data."""
  config = teacher_gkd.get_config("smoke")
  _shorten(config, home)
  config.teacher.path = str(home / "student")
  config.held_out.fraction = 0.3
  config.batch.num_prompts = 2
  config.sampling.complete.max_completion_tokens = 8
  workdir.mkdir(exist_ok=True)
  base, policy, params, common = _opened(config, workdir, should_stop)
  mesh = common["mesh"]
  train_set, eval_set = sets.completions(
    base.tokenizer,
    data=sets.Selection(**config.data),
    held_out=sets.HeldOut(**config.held_out),
    layout=sets.Layout(**config.packing),
    max_new_tokens=8,
    batch_size=config.batch.num_prompts,
    seed=config.seed,
    workdir=workdir,
  )
  teacher = components.open_model(mesh, **config.teacher)
  with components.open_sampler("policy", base, mesh, config) as sampler:
    gkd.train(
      policy,
      params,
      teacher=gkd.Teacher(teacher.model, teacher.params),
      tokenizer=base.tokenizer,
      sampler=sampler,
      train_set=train_set,
      eval_set=eval_set,
      **common,
    )


def _copied(workdir, to):
  """Copies a run; returns False if a concurrent save moves its files."""
  try:
    shutil.copytree(workdir, to)
  except shutil.Error:
    return False
  return True


@pytest.fixture(scope="module", params=[_train_sft, _train_grpo, _train_gkd])
def straight(home, tmp_path_factory, request):
  """Trains to the end; returns recipe, workdir and a copy per step."""
  workdir, copies = tmp_path_factory.mktemp("runs") / "straight", []

  def copy():
    copies.append(workdir.with_name(f"killed-{len(copies)}"))
    while not _copied(workdir, copies[-1]):
      shutil.rmtree(copies[-1])
    return False

  request.param(home, workdir, copy)
  assert len(copies) == _NUM_STEPS
  return request.param, workdir, copies


def _scramble():
  """Seeds global random states differently, since runs must not use them."""
  random.seed(os.urandom(8))
  np.random.seed(random.getrandbits(32))  # noqa: NPY002 - the global state.


def _check_equal(workdir, expected):
  for logged, wanted in zip(_logged(workdir), _logged(expected), strict=True):
    assert logged == wanted
  assert _digest(workdir) == _digest(expected)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(home, straight):
  train, expected, copies = straight
  for killed in copies[1:]:  # Copied before the step was saved.
    _scramble()
    train(home, killed, lambda: False)
    _check_equal(killed, expected)


@pytest.mark.slow
def test_a_run_stopped_after_every_step_resumes_bit_for_bit(
  home, straight, tmp_path
):
  train, expected, _ = straight
  for _ in range(_NUM_STEPS - 1):
    _scramble()
    with pytest.raises(errors.PreemptedError):
      train(home, tmp_path / "stopped", lambda: True)
  train(home, tmp_path / "stopped", lambda: True)
  _check_equal(tmp_path / "stopped", expected)
