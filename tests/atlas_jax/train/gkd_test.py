# SPDX-License-Identifier: Apache-2.0
"""Tests GKD: both models score the completions, and the policy learns."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import chat, errors, sharding
from atlas_jax.data import sets
from atlas_jax.losses import gkd as gkd_loss
from atlas_jax.train import gkd, gkd_batches, loop, rollout_packing
from atlas_jax.train.telemetry import writer
from configs.run import teacher_gkd
from rollout import jax_sampler
from scripts.job import components
from tests import metric_names, tiny

_MAX_NEW = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Returns a directory with a policy, a teacher and data."""
  home = tmp_path_factory.mktemp("home")
  tiny.write_talker(home / "policy", num_hidden_layers=1)
  # Same tokenizer, but the vocabulary is padded to another size.
  wide = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320}
  tiny.write_talker(home / "teacher", family="qwen3", **wide)
  data = [
    {"question": f"What is {i} + {i}?", "solution": f"It is {2 * i}."}
    for i in range(30)
  ]
  (home / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data))
  # These runs are too short to repay compile time.
  name = "jax_disable_most_optimizations"
  old = jax.config.read(name)
  jax.config.update(name, True)
  yield home
  jax.config.update(name, old)


def _config(home, **changes):
  config = teacher_gkd.get_config("smoke")
  config.world.directory = ""
  config.model.path = str(home / "policy")
  config.teacher.path = str(home / "teacher")
  config.data.path = str(home / "data.jsonl")
  config.sampling.complete.max_completion_tokens = _MAX_NEW
  config.batch.num_prompts = 8
  config.schedule.learning_rate = 0.01
  config.loop.num_steps = 4
  config.loop.log_every = 1
  config.loop.eval_every = 0
  config.loop.save_every = 100
  config.checkpoint.load_best = False
  config.update_from_flattened_dict(changes)
  return config


class _RecordingSampler(jax_sampler.JaxSampler):
  """An in-process sampler that records its completions."""

  def sample(self, prompts, params):
    """Samples, and records prompts and completions with their version."""
    groups = super().sample(prompts, params)
    self.written.append((self.version, prompts, groups))
    return groups


class _FalseVersionSampler(jax_sampler.JaxSampler):
  """Keeps its first weights but reports the newest version."""

  def update_weights(self, params, version):
    """Stores the first weights and every version."""
    if version == 0:
      super().update_weights(params, version)
    self._version = version


class _Run:
  """Opens the inputs of a run, trains, and reads its metrics."""

  def __init__(self, config, workdir, *, mesh=None, kind=_RecordingSampler):
    workdir.mkdir(exist_ok=True)
    self.config, self.workdir = config, workdir
    self.mesh = mesh or tiny.mesh()
    self.base = components.open_model(self.mesh, **config.model)
    self.teacher = components.open_model(self.mesh, **config.teacher)
    self.policy, self.params = components.open_policy(
      self.base, self.mesh, seed=config.seed, **config.lora
    )
    self.train_set, self.eval_set = sets.completions(
      self.base.tokenizer,
      data=sets.Selection(**config.data),
      held_out=sets.HeldOut(**config.held_out),
      layout=sets.Layout(**config.packing),
      max_new_tokens=gkd_batches.max_new_tokens(config),
      batch_size=config.batch.num_prompts,
      seed=config.seed,
      workdir=workdir,
    )
    self.sampler = kind(
      self.base.model,
      self.base.params,
      mesh=self.mesh,
      stop_token_ids=(2,),
      max_rows=64,
    )
    self.sampler.written = []

  def train(self, should_stop=lambda: False):
    """Trains to the end and returns the trained parameters."""
    return gkd.train(
      self.policy,
      self.params,
      teacher=gkd.Teacher(self.teacher.model, self.teacher.params),
      tokenizer=self.base.tokenizer,
      sampler=self.sampler,
      train_set=self.train_set,
      eval_set=self.eval_set,
      mesh=self.mesh,
      config=self.config,
      run=loop.Run(
        self.workdir,
        writer.Writer(self.workdir, ()),
        should_stop=should_stop,
      ),
    )

  def logged(self):
    """Returns the logged rows of metrics."""
    lines = (self.workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _divergence(run, params, written):
  """Returns the loss from full logits, with one sequence per row."""
  batch = rollout_packing.make_tokens(written, multiple=1)

  def logits(model, params):
    return jax.jit(model.logits)(
      params, batch["token_ids"], batch["positions"], batch["segment_ids"]
    )

  ours = logits(run.base.model, params)
  theirs = logits(run.teacher.model, run.teacher.params)
  divergence_BT = gkd_loss.generalized_jsd(
    ours,
    theirs[..., : ours.shape[-1]],  # Tokens both models have.
    beta=0.5,
    temperature=1.0,
  )
  spans = [
    divergence_BT[i, len(prompt) - 1 : len(prompt) + len(completion) - 1]
    for i, (prompt, completion) in enumerate(written)
  ]
  return float(jnp.concatenate(spans).mean())


@pytest.mark.slow
def test_both_models_score_the_sampled_tokens_and_loss_falls(home, tmp_path):
  config = _config(
    home,
    **{
      "completions.on_policy_fraction": 1.0,
      "loop.num_steps": 24,
      "loop.eval_every": 12,
      "loop.save_every": 12,
    },
  )
  run = _Run(config, tmp_path / "run")
  start = jax.tree.map(jnp.copy, run.params)
  before = jax.device_get(run.teacher.params)
  run.train()
  # Each step samples with that step's weights.
  assert [version for version, *_ in run.sampler.written] == list(range(24))
  _, prompts, groups = run.sampler.written[0]
  batch = run.train_set.batch(0)
  assert [p.token_ids for p in prompts] == [tuple(p.prompt) for p in batch]
  written = [
    (p.token_ids, c.token_ids)
    for p, group in zip(prompts, groups, strict=True)
    for c in group
  ]
  losses = [row["loss"] for row in run.logged() if "loss" in row]
  want = _divergence(run, start, written)
  assert losses[0] == pytest.approx(want, rel=1e-5)
  assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
  evaluated = [r["eval/loss"] for r in run.logged() if "eval/loss" in r]
  assert len(evaluated) == 2
  assert evaluated[1] < evaluated[0]
  jax.tree.map(np.testing.assert_array_equal, before, run.teacher.params)
  metric_names.check("GKD", run.logged())


_PLAIN = {"completions.on_policy_fraction": 0.0, "loop.num_steps": 3}


@pytest.fixture(scope="module")
def plain(home, tmp_path_factory):
  """Trains on one device with packed rows of the data in a single batch.

  Returns the run, its initial parameters and its trained parameters.
  """
  run = _Run(_config(home, **_PLAIN), tmp_path_factory.mktemp("plain"))
  run.sampler = None
  start = jax.tree.map(jnp.copy, run.params)
  return run, start, run.train()


@pytest.mark.slow
def test_without_sampling_both_models_score_the_data(plain):
  run, start, _ = plain
  batch = run.train_set.batch(0)
  answer = chat.decode(run.base.tokenizer, batch[0].completion)
  assert answer.startswith("It is ")
  want = _divergence(run, start, [(p.prompt, p.completion) for p in batch])
  losses = [row["loss"] for row in run.logged() if "loss" in row]
  assert losses[0] == pytest.approx(want, rel=1e-5)
  assert losses[-1] < losses[0]
  assert {row["on_policy"] for row in run.logged() if "loss" in row} == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes", [{"batch.per_device": 1, "packing.packed": False}, {}]
)
def test_layout_and_mesh_do_not_change_the_update(
  home, tmp_path, plain, changes, monkeypatch
):
  rows_of_programs = tiny.record_rows(monkeypatch, gkd)
  mesh = None if changes else sharding.make_mesh(data=2, fsdp=2, tensor=2)
  run = _Run(_config(home, **_PLAIN, **changes), tmp_path / "run", mesh=mesh)
  trained = run.train()
  for got, want in zip(*map(jax.tree.leaves, (trained, plain[2])), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-5)
  if changes:  # Evaluation, too, has one row per microbatch.
    assert set(rows_of_programs) == {1}


@pytest.mark.slow
def test_a_sampler_with_stale_weights_raises(home, tmp_path):
  config = _config(
    home,
    **{
      "completions.on_policy_fraction": 1.0,
      "agreement.every_steps": 1,
      "schedule.learning_rate": 0.1,
    },
  )
  with pytest.raises(errors.DivergedError, match="disagree"):
    _Run(config, tmp_path / "run", kind=_FalseVersionSampler).train()


@pytest.mark.slow
def test_adapters_learn_and_resume_only_from_the_same_teacher(home, tmp_path):
  config = _config(home, **{"lora.rank": 4, "loop.num_steps": 12})
  # About half of the steps are sampled.
  run = _Run(config, tmp_path / "run")
  start = jax.device_get(run.params)
  trained = run.train()
  logged = [row for row in run.logged() if "loss" in row]
  assert logged[-1]["loss"] < logged[0]["loss"]
  sampled = [row["on_policy"] for row in logged]
  assert 2 < sum(sampled) < 10
  assert sum(sampled) == len(run.sampler.written)
  names = {path[-1].key for path, _ in jax.tree.leaves_with_path(trained)}
  assert names == {"lora_a", "lora_b"}
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, trained, start)
  assert all(jax.tree.leaves(moved))

  config.teacher.path = str(home / "policy")
  with pytest.raises(errors.CheckpointError, match="another teacher") as caught:
    _Run(config, tmp_path / "run").train()
  assert caught.value.exit_code == 5


def test_router_loss_is_added_for_mixture_of_experts():
  policy = tiny.build("qwen3_moe", layout=None)
  teacher = tiny.build("qwen3", hidden_size=16)
  params = gkd.with_teacher(
    tiny.params_of(policy), gkd.Teacher(teacher, tiny.params_of(teacher, 1))
  )
  tokens, positions, segments = tiny.batch(policy)
  batch = {
    "token_ids": tokens,
    "positions": positions,
    "segment_ids": segments,
    "loss_mask": positions > 3,
  }
  loss_fn = functools.partial(
    gkd.packed_loss,
    policy,
    teacher,
    beta=0.5,
    temperature=1.0,
    chunk_tokens=4,
    router_aux_coef=0.1,
  )
  loss, (weight, metrics) = jax.jit(loss_fn)(params, batch)
  assert weight == 2 * 5
  balance = metrics["router_aux_loss"]
  assert balance > 1.0
  np.testing.assert_allclose(loss, metrics["divergence"] + 0.1 * balance)
  assert metrics["loss"] == loss


@pytest.mark.parametrize(
  "changes",
  [
    {"loss.beta": 1.5},
    {"loss.temperature": 0.0},
    {"completions.on_policy_fraction": 1.1},
    {"completions.max_dropped_fraction": 1.0},
    {"agreement.every_steps": 0},
    {"experts.router_aux_coef": 0.1},
    {"num_epochs": 1.0},
  ],
)
def test_invalid_settings_raise(home, tmp_path, changes):
  with pytest.raises(errors.ConfigError):
    _Run(_config(home, **changes), tmp_path / "run").train()


def test_tokenizers_with_different_ids_raise(home):
  tokenizer = chat.load_tokenizer(home / "policy")
  gkd.check_tokenizers(tokenizer, tokenizer)
  other = chat.load_tokenizer(home / "policy")
  other.add_tokens(["<more>"])
  with pytest.raises(
    errors.ConfigError, match="different tokenizers"
  ) as caught:
    gkd.check_tokenizers(tokenizer, other)
  assert "'<more>' is None and 300" in caught.value.why
