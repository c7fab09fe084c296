# SPDX-License-Identifier: Apache-2.0
"""Tests GRPO: sampling with current weights, learning and resuming."""

import dataclasses
import json

import jax
import ml_collections
import numpy as np
import pytest

from atlas_jax import chat, errors, sharding, types
from atlas_jax.data import loader
from atlas_jax.losses import logprobs
from atlas_jax.models import lora, quantized
from atlas_jax.rewards import grading
from atlas_jax.teaching import protocol, roles, templates
from atlas_jax.train import (
  batch_shapes,
  grpo,
  loop,
  rollout_packing,
  score,
  trainable,
)
from atlas_jax.train.telemetry import writer as train_writer
from configs import lora as adapters
from configs import optimizer as optimizers
from conversion import load
from rollout import jax_sampler
from tests import fakes, metric_names, tiny

_QUESTIONS = [
  types.Question(f"q{i}", f"What is {i} + {i}?", str(2 * i)) for i in range(4)
]
_MAX_NEW = 8
_SYNC_EVERY, _MIX = 3, 0.25


def _config(**changes):
  teach = {
    "group_size": 8,
    "max_completion_tokens": _MAX_NEW,
    "temperature": 0.9,
    "top_p": 1.0,
    "top_k": 0,
  }
  config = ml_collections.ConfigDict(
    {
      "seed": 3,
      "dry_pass": False,
      "lora": adapters.get_config(),
      "sampling": {"teach": teach},
      "rollout": {"backend": "jax"},
      "overlap": {"max_staleness": 0},
      "agreement": {"max_prob_error": 1.01, "every_steps": 1},
      "alarm": {
        "max_ratio": 100.0,
        "max_kl": 10.0,
        "stop": False,
        "min_used_fraction": 0.1,
      },
      "advantages": {"baseline": "mean", "scale": "group", "min_std": 0.0},
      "groups": {
        "filter_equal": True,
        "max_refills": 0,
        "max_dropped_fraction": 0.5,
      },
      "correction": {
        "level": "token",
        "outside": "truncate",
        "min_ratio": 0.0,
        "max_ratio": 2.0,
      },
      "logits": {"chunk_tokens": 32},
      "experts": {"router_aux_coef": 0.0},
      "loss": {
        "ratio": "token",
        "clipping": "objective",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "max_ratio": ml_collections.config_dict.placeholder(float),
        "kl_coef": 0.01,
        "kl_estimator": "k3",
        "kl_in": "loss",
        "entropy_coef": 0.0,
        "aggregate": "sequence_mean",
      },
      "reference": {"sync_every": _SYNC_EVERY, "mix": _MIX, "dtype": ""},
      "offload": {"optimizer": False, "reference": False},
      "batch": {
        "num_questions": 2,
        "num_iterations": 1,
        "num_minibatches": 1,
        "per_device": 0,
        "mask_truncated": False,
      },
      "packing": {"length": 0, "packed": False},
      "roles": {"policy": {"max_prompt_tokens": 0}},
      "schedule": {
        "learning_rate": 0.15,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "warmup_steps": 0,
        "decay_fraction": 0.0,
      },
      "optimizer": optimizers.get_config(),
      "loop": {
        "num_steps": 6,
        "log_every": 1,
        "eval_every": 0,
        "save_every": 2,
        "max_nonfinite": 1,
        "profile_steps": "",
        "watchdog_s": 0.0,
        "require_updates": False,
      },
      "checkpoint": {
        "keep": 3,
        "max_failed": 2,
        "allow_changed": "",
        "best_metric": "",
        "best_mode": "max",
        "load_best": False,
      },
      "evaluation": {"num_bootstrap": 20},
      "samples": {
        "log_completions_every": 2,
        "num_completions": 3,
        "stored_fraction": 0.5,
        "successful_reward": 0.0,
      },
    }
  )
  del config.lora.path  # Read only by `components.open_policy`.
  config.update_from_flattened_dict(changes)
  return config


@dataclasses.dataclass
class _World:
  model: object
  tokenizer: chat.Tokenizer
  directory: object

  def params(self, seed=0, *, param_dtype="float32"):
    """Returns the parameters, loaded from disk if quantized."""
    if param_dtype in quantized.KINDS:
      return load.load(self.directory, self.model, param_dtype=param_dtype)
    params = tiny.params_of(self.model, seed)
    mesh = tiny.mesh()
    return jax.device_put(
      params, sharding.of_params(mesh, self.model.abstract_params)
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  tokenizer = fakes.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
  shape = {"vocab_size": len(tokenizer), "num_hidden_layers": 1}
  directory = tmp_path_factory.mktemp("world") / "model"
  tiny.write_checkpoint(directory, "qwen2", **shape)
  model = tiny.build("qwen2", **shape, unroll=1, remat="dots")
  return _World(model, tokenizer, directory)


def _sampling(group_size, temperature=0.9):
  return types.SamplingParams(
    group_size=group_size,
    max_completion_tokens=_MAX_NEW,
    temperature=temperature,
    top_p=1.0,
    top_k=0,
    seed=3,
  )


class _RecordingSampler(jax_sampler.JaxSampler):
  """An in-process sampler that also samples `watched` after each call."""

  watched: types.Prompt

  def sample(self, prompts, params):
    """Samples, and records a completion of `watched` by version."""
    if not hasattr(self, "recorded"):
      self.recorded = {}
    groups = super().sample(prompts, params)
    ((watched, *_),) = super().sample([self.watched], _sampling(2))
    self.recorded[self.version] = watched
    return groups


class _DroppingSampler(_RecordingSampler):
  """Drops the first prompt of every call with the initial weights."""

  def sample(self, prompts, params):
    """Samples, and returns no completions for the dropped prompt."""
    groups = super().sample(prompts, params)
    return [[], *groups[1:]] if self.version == 0 else groups


class _StaleSampler(_RecordingSampler):
  """Keeps its first weights and reports their version."""

  def update_weights(self, params, version):
    """Stores the first weights only."""
    if version == 0:
      super().update_weights(params, version)


class _FalseVersionSampler(_RecordingSampler):
  """Keeps its first weights but reports the newest version."""

  def update_weights(self, params, version):
    """Stores the first weights and every version."""
    if version == 0:
      super().update_weights(params, version)
    self._version = version


def _protocol(world, kind, param_dtype="float32"):
  sampler = kind(
    world.model,
    world.params(param_dtype=param_dtype),
    mesh=tiny.mesh(),
    stop_token_ids=(2,),
    max_rows=64,
  )
  text, token_ids = chat.render(
    world.tokenizer, [types.Message("user", "Teach.")]
  )
  sampler.watched = types.Prompt("watched", text, token_ids)
  student = fakes.FakeSampler(world.tokenizer, lambda *_: "4")
  return protocol.Protocol(
    roles.Role(sampler, world.tokenizer),
    roles.Role(student, world.tokenizer),
    templates.Templates(
      probe="Plan: {question}",
      teach="Teach: {question} {probe}",
      taught="Solve: {question} {teaching}",
      baseline="Solve: {question}",
    ),
    probe_params=_sampling(1),
    teach_params=_sampling(8),
    solve_params=_sampling(1),
    baseline_params=_sampling(1),
  )


def _evaluation(training):
  """Returns a protocol with one teaching and a student of its own."""
  tokenizer = training.student.tokenizer
  student = fakes.FakeSampler(tokenizer, lambda *_: "4")
  return protocol.Protocol(
    training.policy,
    roles.Role(student, tokenizer),
    training.templates,
    probe_params=_sampling(1),
    teach_params=_sampling(1),
    solve_params=_sampling(2),
    baseline_params=_sampling(3),
  )


def _low_id_fraction(records):
  """Rewards the fraction of ids below 128, which any policy can learn."""
  rewards = []
  for record in records:
    ids = np.array(record.teacher_rollout.completion.token_ids)
    rewards.append(types.Reward(float((ids < 128).mean())))
  return rewards


def _equal_rewards_for_q0(records):
  """Returns `_low_id_fraction`, but equal rewards for question q0."""
  return [
    types.Reward(0.5) if record.question.row_id == "q0" else reward
    for record, reward in zip(records, _low_id_fraction(records), strict=True)
  ]


def _train(
  world,
  workdir,
  *,
  kind=_RecordingSampler,
  stop_at=None,
  held_out=0,
  reward_fn=_low_id_fraction,
  param_dtype="float32",
  **changes,
):
  config = _config(**changes)
  policy_protocol = _protocol(world, kind, param_dtype)
  sampler = policy_protocol.policy.sampler
  evaluation = _evaluation(policy_protocol)
  sampler.evaluated = evaluation.student.sampler.calls
  policy, params = trainable.create(
    world.model,
    world.params(param_dtype=param_dtype),
    adapters=lora.Lora(**config.lora),
    mesh=tiny.mesh(),
    key=jax.random.key(config.seed),
  )
  params = grpo.train(
    policy,
    params,
    protocol=policy_protocol,
    grader=grading.by_rules(),
    reward_fn=reward_fn,
    questions=loader.QuestionLoader(
      _QUESTIONS,
      mix=loader.Mix((len(_QUESTIONS),), (), seed=config.seed),
      batch_size=config.batch.num_questions,
    ),
    held_out=_QUESTIONS[:held_out],
    evaluation=evaluation,
    mesh=tiny.mesh(),
    config=config,
    run=loop.Run(
      workdir,
      train_writer.Writer(workdir, ()),
      should_stop=lambda: sampler.version + 1 == stop_at,
    ),
  )
  return params, sampler


def _rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("straight")
  params, sampler = _train(world, workdir)
  return params, sampler, _rows(workdir)


@pytest.mark.slow
def test_each_step_samples_with_the_latest_weights(trained):
  _, sampler, _ = trained
  assert list(sampler.recorded) == list(range(6))
  sampled = {completion.token_ids for completion in sampler.recorded.values()}
  assert len(sampled) == 6
  assert all(c.version == step for step, c in sampler.recorded.items())


@pytest.mark.slow
def test_the_reward_increases(trained):
  _, _, rows = trained
  rewards = [row["reward"] for row in rows]
  assert rewards[-1] > rewards[0] + 0.2
  # Sampler and trainer hold the same weights, so their logprobs agree.
  assert all(row["rollout/logprob_gap"] < 1e-4 for row in rows)
  assert all(row["rollout/prob_error"] < 1.0001 for row in rows)
  assert all(row["rollout/policy_tokens_per_s"] > 0.0 for row in rows)
  # The first update is on policy, and the policy equals the reference.
  assert rows[0]["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
  assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
  assert rows[1]["kl"] > 0.0


@pytest.mark.slow
def test_logged_metrics_match_the_docs_and_sum_to_step_time(
  world, trained, tmp_path, caplog
):
  caplog.set_level("INFO")
  changes = {"loop.num_steps": 3, "loop.eval_every": 2, "loop.save_every": 2}
  changes["dry_pass"] = True
  _, sampler = _train(world, tmp_path, held_out=2, **changes)
  rows = _rows(tmp_path)
  # The dry pass shows a question, and changes no bit of the training.
  assert "Dry pass of row q" in caplog.text
  assert "taught answer             4 [" in caplog.text
  steps = [row for row in rows if "reward" in row]
  for row, without in zip(steps, trained[2][:3], strict=True):
    for name in ("reward", "loss", "grad_norm", "kl"):
      assert row[name] == without[name]
  assert rows[0]["rollout/policy_tokens_per_s"] > 0.0
  metric_names.check("GRPO", rows)
  for row in rows:
    if "step_s" in row:
      seconds = [s for k, s in row.items() if k.startswith("seconds/")]
      assert sum(seconds) == pytest.approx(row["step_s"])
      assert row["seconds/idle"] < 0.2 * row["step_s"]
  # Time for the evaluation and save of step 2 is logged with step 3.
  assert [row["step"] for row in rows if "seconds/eval" in row] == [3]
  # Two evaluations: baselines in the first, then probes and taught answers.
  sizes = [(len(p), params.group_size) for p, params in sampler.evaluated]
  assert sizes[:3] == [(1, 3), (1, 1), (1, 2)]  # The dry pass.
  num_new = 1 if sizes[3] == (1, 3) else 2  # Its question may be held out too.
  assert sizes[3:] == [(num_new, 3), (2, 1), (2, 2), (2, 1), (2, 2)]
  assert (tmp_path / "completions/step-2.jsonl").exists()
  assert (tmp_path / "stored_completions/2.csv").exists()
  lessons = (tmp_path / "successful_teaching").iterdir()
  names = {path.name for path in lessons}
  assert names == {f"step-{step}.jsonl" for step in (1, 2, 3)}


@pytest.mark.slow
def test_a_resumed_run_matches_an_uninterrupted_run_bit_for_bit(
  world, trained, tmp_path
):
  with pytest.raises(errors.PreemptedError):
    _train(world, tmp_path, stop_at=4)
  params, sampler = _train(world, tmp_path)
  assert list(sampler.recorded) == [4, 5]
  jax.tree.map(np.testing.assert_array_equal, params, trained[0])
  assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


_ADAPTERS = {
  "lora.rank": 4,
  "lora.alpha": 8.0,
  "reference.sync_every": 0,
  "loop.num_steps": 3,
}


@pytest.mark.slow
@pytest.mark.parametrize("param_dtype", ["float32", "int8"])
def test_sampling_uses_the_adapters(world, tmp_path, param_dtype):
  _train(world, tmp_path, param_dtype=param_dtype, **_ADAPTERS)
  rows = _rows(tmp_path)
  # The first update starts at the base; later ones move away from it.
  assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
  assert rows[-1]["kl"] > 1e-3
  assert all(row["rollout/prob_error"] < 1.0001 for row in rows)


def test_syncing_the_reference_of_adapters_raises(world, tmp_path):
  with pytest.raises(errors.ConfigError, match="sync_every=3"):
    _train(world, tmp_path, **{**_ADAPTERS, "reference.sync_every": 3})


@pytest.mark.slow
def test_offloading_is_bitwise_equal(world, trained, tmp_path):
  offload = {"offload.optimizer": True, "offload.reference": True}
  params, _ = _train(world, tmp_path, **offload)
  jax.tree.map(np.testing.assert_array_equal, params, trained[0])
  kl, trained_kl = ([r["kl"] for r in x] for x in (_rows(tmp_path), trained[2]))
  assert kl == trained_kl


@pytest.mark.slow
def test_groups_of_equal_rewards_are_refilled(world, tmp_path):
  _train(
    world,
    tmp_path,
    reward_fn=_equal_rewards_for_q0,
    **{"loop.num_steps": 2, "groups.max_refills": 3},
  )
  rows = _rows(tmp_path)
  # Two steps of two questions each ask all four, so one of them asks q0.
  assert sorted(row["groups/refills"] for row in rows) == [0, 1]
  used = {row["groups/refills"]: row["groups/used_fraction"] for row in rows}
  assert used[0] == 1.0
  assert used[1] == pytest.approx(2 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("max_refills", [0, 2])
def test_training_uses_the_groups_that_were_not_dropped(
  world, tmp_path, max_refills
):
  changes = {"loop.num_steps": 2, "groups.max_refills": max_refills}
  _train(world, tmp_path, kind=_DroppingSampler, **changes)
  rows = _rows(tmp_path)
  assert [row["groups/dropped_fraction"] for row in rows] == [0.5, 0.0]
  assert [row["rewards/unavailable"] for row in rows] == [0, 0]
  assert [row["groups/used_fraction"] for row in rows] == [1.0, 1.0]
  # The sampler drops the replacement too.
  assert [row["groups/refills"] for row in rows] == [0, 0]
  assert all(row["grad_norm"] > 0.0 for row in rows)
  assert rows[0]["num_tokens"] < 0.7 * rows[1]["num_tokens"]


def test_too_many_dropped_groups_raise(world, tmp_path):
  change = {"groups.max_dropped_fraction": 0.25}
  with pytest.raises(errors.RolloutError, match="1 of 2 questions"):
    _train(world, tmp_path, kind=_DroppingSampler, **change)


@pytest.mark.slow
def test_a_sampler_that_ignores_new_weights_raises(world, tmp_path):
  with pytest.raises(RuntimeError, match=r"versions \[0\] at step 1"):
    _train(world, tmp_path, kind=_StaleSampler)


@pytest.mark.slow
def test_a_sampler_that_reports_a_wrong_version_raises(world, tmp_path):
  with pytest.raises(errors.DivergedError, match="step 1"):
    _train(world, tmp_path, kind=_FalseVersionSampler, **{"loop.num_steps": 2})
  (first,) = _rows(tmp_path)
  assert first["rollout/prob_error"] < 1.0001


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"sampling.teach.temperature": 0.0}, "temperature=0"),
    ({"sampling.teach.group_size": 1}, "group_size=1"),
    ({"groups.filter_equal": False, "groups.max_refills": 2}, "max_refills=2"),
    ({"groups.max_dropped_fraction": 1.0}, r"\[0, 1\), got 1.0"),
    ({"loss.ratio": "word"}, "ratio=word"),
    ({"advantages.scale": "median"}, "scale=median"),
    ({"reference.dtype": "float16"}, "dtype=float16"),
    ({"reference.dtype": "bfloat16", "loss.kl_coef": 0.0}, "without a copy"),
    ({"correction.level": "group"}, "level='group'"),
  ],
)
def test_invalid_settings_raise_before_sampling(world, tmp_path, change, match):
  with pytest.raises(errors.ConfigError, match=match):
    _train(world, tmp_path, **change)


@pytest.mark.parametrize(
  "cut", [{}, {"top_p": 0.7}, {"top_k": 5}, {"top_p": 0.7, "top_k": 40}]
)
def test_trainer_logprobs_match_rollout_logprobs_in_packed_rows(world, cut):
  sampler = _protocol(world, _RecordingSampler).policy.sampler
  prompts = [
    types.Prompt(f"p{i}", "", tuple(range(5, 9 + 3 * i))) for i in range(2)
  ]
  params = dataclasses.replace(_sampling(2), **cut)
  groups = jax_sampler.JaxSampler.sample(sampler, prompts, params)
  rollouts = [
    types.Rollout(prompt, completion)
    for prompt, group in zip(prompts, groups, strict=True)
    for completion in group
  ]
  (part,) = rollout_packing.lay_out(
    rollouts,
    batch_shapes.Layout(
      length=64,
      packed=True,
      per_device=0,
      num_minibatches=1,
      num_shards=1,
      max_sequences=len(rollouts),
      max_length=64,
    ),
    max_completion_tokens=params.max_completion_tokens,
  )
  batch = part.batch
  support = logprobs.Support(params.top_p, params.top_k) if cut else None
  stats = jax.jit(
    lambda model_params, batch: score.token_stats(
      world.model,
      model_params,
      batch,
      temperature=params.temperature,
      chunk_tokens=32,
      support=support,
    )
  )(world.params(), batch)
  completions = batch["completions"]
  logprobs_BT, mask_BT = rollout_packing.gather_scores(
    stats.logprobs, completions["places"], 0
  )
  assert mask_BT.sum() == sum(len(r.completion.token_ids) for r in rollouts)
  np.testing.assert_allclose(
    logprobs_BT[mask_BT], completions["rollout_logprobs"][mask_BT], atol=1e-4
  )
