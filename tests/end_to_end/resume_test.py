# SPDX-License-Identifier: Apache-2.0
"""Whenever it is killed, a run ends bit for bit as if it were not.

What is on disk when a step ends is what SIGKILL would leave there. So a run is
copied after each step while it goes on, and copies are resumed.
"""

import hashlib
import json
import re
import shutil

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import orbax.checkpoint as ocp
import pytest

from atlas_jax import launch, sharding, types
from atlas_jax.data import sets
from atlas_jax.train import grpo, sft, writer
from configs.run import teacher_rcl, teacher_sft
from tests import tiny

_NUM_STEPS = 4
# What depends on the machine.
_TIMES = re.compile(r".*(seconds.*|time|_s)|num_compiles|goodput|.*tflops|mfu")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Gives a folder with two models and data for both recipes."""
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
  # The resumed runs need not compile the same programs once more.
  old = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", str(home / "cache"))
  yield home
  jax.config.update("jax_compilation_cache_dir", old)
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


def _opened(config, workdir):
  """Opens what both recipes need."""
  mesh = jax.make_mesh(
    (1,) * len(sharding.AXES),
    sharding.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.AXES),
    devices=jax.devices()[:1],
  )
  base = launch.open_model(mesh, **config.model)
  policy, params = launch.open_policy(
    base, mesh, seed=config.seed, **config.lora
  )
  common = {
    "on_save": lambda *_: None,
    "mesh": mesh,
    "config": config,
    "workdir": workdir,
    "writer": writer.Writer(workdir, ()),
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
  base, policy, params, common = _opened(config, workdir)
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
    should_stop=should_stop,
    **common,
  )


def _share_of_low_ids(records):
  """A reward that random models differ in."""
  ids = [np.array(r.teacher_rollout.completion.token_ids) for r in records]
  return [types.Reward(float((each < 128).mean())) for each in ids]


def _train_grpo(home, workdir, should_stop):
  """Trains while the next batch is sampled; a reference follows the policy."""
  config = teacher_rcl.get_config("smoke")
  _shorten(config, home)
  config.student.path = str(home / "student")
  config.held_out = {"path": "", "fraction": 0.3}
  config.overlap.max_staleness = 1
  config.agreement.every = 2 * _NUM_STEPS
  config.reference.sync_every = 2
  config.batch.num_questions = 2
  config.batch.mask_truncated = False
  config.groups.filter_equal = False
  config.sampling.teach.group_size = 2
  for phase in config.sampling.values():
    phase.max_completion_tokens = 8
  workdir.mkdir(exist_ok=True)
  base, policy, params, common = _opened(config, workdir)
  mesh = common["mesh"]
  questions, held_out = sets.questions(
    sets.Selection(**config.data),
    sets.HeldOut(**config.held_out),
    batch_size=config.batch.num_questions,
    seed=config.seed,
    workdir=workdir,
  )
  student = launch.open_model(mesh, **config.student)
  with launch.open_protocol(base, student, mesh, config) as protocol:
    grpo.train(
      policy,
      params,
      protocol=protocol,
      reward_fn=_share_of_low_ids,
      questions=questions,
      held_out=held_out,
      should_stop=should_stop,
      **common,
    )


def _told(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if not _TIMES.fullmatch(k)}
    for line in lines
  ]


def _digest(workdir):
  """Digests all that the last step of a run holds."""
  last = workdir / "checkpoints" / str(_NUM_STEPS)
  digest = hashlib.sha256((last / "host_state.json").read_bytes())
  state = ocp.StandardCheckpointer().restore(last.absolute() / "state")
  for path, leaf in jax.tree.leaves_with_path(state):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("train", [_train_sft, _train_grpo])
def test_killed_at_any_step_it_ends_as_if_it_were_not(home, tmp_path, train):
  copies = []

  def copy():
    copies.append(tmp_path / f"killed-{len(copies)}")
    shutil.copytree(tmp_path / "straight", copies[-1])
    return False

  train(home, tmp_path / "straight", copy)
  assert len(copies) == _NUM_STEPS
  for killed in copies[1::2]:  # Before the save of their last step is whole.
    train(home, killed, lambda: False)
    for told, expected in zip(
      _told(killed), _told(tmp_path / "straight"), strict=True
    ):
      assert told == expected
    assert _digest(killed) == _digest(tmp_path / "straight")
