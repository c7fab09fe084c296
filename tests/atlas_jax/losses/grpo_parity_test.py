# SPDX-License-Identifier: Apache-2.0
"""GRPO loss against TRL's methods on the same arrays.

`GRPOTrainer` is never built: its methods run on a stand-in for `self` whose
models return recorded log-probabilities, so TRL's code sees our arrays.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.losses import advantages, correction, grpo, kl

torch = pytest.importorskip("torch")
grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer")

_P, _C, _T = 3, 4, 8
_B = _P * _C
_MAX_TOKENS = 13
_ENTROPY_BT = (
  np.random.default_rng(1).uniform(0.1, 3.0, (_B, _T)).astype(np.float32)
)
_TIS = dict(level="token", outside="truncate", min_ratio=0.0, max_ratio=1.5)
_GRPO = dict(
  ratio="token",
  clipping="objective",
  clip_low=0.2,
  clip_high=0.28,
  max_ratio=None,
  kl_coef=0.04,
  kl_estimator="k3",
  kl_in="loss",
  entropy_coef=0.0,
  aggregate="sequence_mean",
  max_tokens=_MAX_TOKENS,
)
# Sequence ratios are closer to 1.
_NARROW = dict(clip_low=0.02, clip_high=0.03)
_THEIR_NARROW = dict(epsilon_low=0.02, epsilon_high=0.03)


class _Recording(torch.nn.Module):
  """A model that returns fixed log-probabilities."""

  is_gradient_checkpointing = False

  def __init__(self, logprobs_BT):
    super().__init__()
    self.logprobs_BT = torch.nn.Parameter(torch.tensor(logprobs_BT))
    self.entropy_BT = torch.nn.Parameter(torch.tensor(_ENTROPY_BT))


def _arrays():
  """Four kinds of log-probabilities, lengths, rewards with one missing."""
  rng = np.random.default_rng(0)
  logprobs_BT = -rng.exponential(size=(_B, _T))
  old_BT, ref_BT, rollout_BT = (
    logprobs_BT + 0.4 * rng.normal(size=(_B, _T)) for _ in range(3)
  )
  rewards_PC = rng.normal(size=(_P, _C))
  rewards_PC[0, 1] = np.nan
  rewards_PC[2] = 0.1
  lengths_B = rng.integers(1, _T, _B)
  lengths_B[0] = _T
  arrays = (logprobs_BT, old_BT, ref_BT, rollout_BT, rewards_PC)
  return *(x.astype(np.float32) for x in arrays), lengths_B


def _trainer(loss_type="grpo", **changes):
  """Fakes the attributes that GRPOTrainer.__init__ sets."""
  _, old_BT, ref_BT, rollout_BT, rewards_PC, lengths_B = _arrays()
  completions = [[1] * length for length in lengths_B]
  reported = [
    row[:length].tolist()
    for row, length in zip(rollout_BT, lengths_B, strict=True)
  ]
  args = types.SimpleNamespace(
    steps_per_generation=1,
    gradient_accumulation_steps=1,
    per_device_train_batch_size=_B,
    gradient_checkpointing_kwargs=None,
    use_bias_correction_kl=changes.pop("use_bias_correction_kl", False),
    delta=changes.pop("delta", None),
  )
  accelerator = types.SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    process_index=0,
    sync_gradients=True,
    gather=lambda x: x,
    reduce=lambda x, **_: x,
  )
  fields = dict(
    args=args,
    accelerator=accelerator,
    model=_Recording(old_BT).requires_grad_(False),
    ref_model=_Recording(ref_BT).requires_grad_(False),
    loss_type=loss_type,
    beta=0.04,
    epsilon_low=_GRPO["clip_low"],
    epsilon_high=_GRPO["clip_high"],
    importance_sampling_level="token",
    use_vllm=True,
    vllm_importance_sampling_correction=True,
    vllm_importance_sampling_mode="token_truncate",
    vllm_importance_sampling_clip_min=None,
    vllm_importance_sampling_clip_max=_TIS["max_ratio"],
    num_generations=_C,
    num_iterations=1,
    current_gradient_accumulation_steps=1,
    scale_rewards="group",
    multi_objective_aggregation="sum_then_normalize",
    reward_weights=torch.ones(1),
    reward_funcs=[None],
    reward_func_names=["reward"],
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    mask_truncated_completions=False,
    aux_loss_enabled=False,
    use_adaptive_entropy=False,
    entropy_coef=0.0,
    max_completion_length=_MAX_TOKENS,
    environment_factories=None,
    environments=None,
    tools=None,
    pad_to_multiple_of=None,
    log_multimodal=False,
    _tokenizer=types.SimpleNamespace(pad_token_id=0),
    _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    _logs=collections.defaultdict(
      list, rewards=collections.defaultdict(list), extra={}
    ),
    _pending_extra_logs={},
    _pending_metrics={},
    _generate=lambda prompts: (
      [[1]] * len(prompts),
      completions,
      None,
      [""] * len(prompts),
      reported,
      {},
      None,
      None,
    ),
    _calculate_rewards=lambda *_: torch.tensor(rewards_PC.reshape(_B, 1)),
    _get_per_token_logps_and_entropies=lambda model, *_, **__: (
      model.logprobs_BT,
      model.entropy_BT,
      None,
    ),
  )
  trainer = types.SimpleNamespace(**{**fields, **changes})
  trainer._entropy_bonus_enabled = trainer.entropy_coef > 0.0
  return trainer


def _theirs(**changes):
  """Returns TRL's batch, loss, gradients and metrics."""
  trainer_class = grpo_trainer.GRPOTrainer
  trainer, policy = _trainer(**changes), _Recording(_arrays()[0])
  prompts = [{"prompt": ""}] * _B
  batch = trainer_class._generate_and_score_completions(trainer, prompts)
  loss = trainer_class._compute_loss(trainer, policy, batch)
  loss.backward()
  grads = [policy.logprobs_BT.grad, policy.entropy_BT.grad]
  return batch, loss.item(), grads, trainer._metrics["train"]


def _arguments():
  """Returns our arguments for TRL's arrays, and the mask."""
  *arrays, lengths_B = map(jnp.asarray, _arrays())
  return *arrays, jnp.arange(_T) < lengths_B[:, None]


def _ours(advantages_B, *, weigh=_TIS, **changes):
  """Returns our loss, gradients and metrics."""
  logprobs_BT, old_BT, ref_BT, rollout_BT, _, mask_BT = _arguments()
  weights_BT = correction.sampler_weights(old_BT, rollout_BT, mask_BT, **weigh)
  objective = grpo.Objective(**{**_GRPO, **changes})

  def loss(logprobs_BT, entropy_BT):
    return grpo.surrogate(
      logprobs_BT,
      old_BT,
      ref_BT,
      entropy_BT,
      advantages_B,
      mask_BT,
      rollout_weights_BT=weights_BT,
      objective=objective,
    )

  (value, metrics), grads = jax.value_and_grad(
    loss, argnums=(0, 1), has_aux=True
  )(logprobs_BT, jnp.asarray(_ENTROPY_BT))
  return value, grads, metrics


def _assert_same(ours, theirs):
  loss, grads, _ = ours
  _, want, want_grads, _ = theirs
  np.testing.assert_allclose(loss, want, atol=1e-5)
  for grad_BT, want_BT in zip(grads, want_grads, strict=True):
    want_BT = np.zeros((_B, _T)) if want_BT is None else want_BT
    np.testing.assert_allclose(grad_BT, want_BT, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
  ("theirs", "ours"),
  [
    ({"loss_type": "grpo"}, {}),
    ({"loss_type": "bnpo"}, {"aggregate": "token_mean"}),
    ({"loss_type": "dapo"}, {"aggregate": "token_mean"}),
    ({"loss_type": "dr_grpo"}, {"aggregate": "constant_length"}),
    (
      {"loss_type": "cispo", "epsilon_high": 1.3},
      {
        "clipping": "weight",
        "clip_low": 1.0,
        "clip_high": 0.3,
        "aggregate": "token_mean",
      },
    ),
    (
      {"importance_sampling_level": "sequence", **_THEIR_NARROW},
      {"ratio": "sequence", **_NARROW},
    ),
    ({"delta": 1.5}, {"max_ratio": 1.5}),
    ({"use_bias_correction_kl": True}, {"kl_in": "weighted_loss"}),
    (
      {"loss_type": "dapo", "entropy_coef": 0.2},
      {"aggregate": "token_mean", "entropy_coef": 0.2},
    ),
  ],
  ids=str,
)
def test_loss_and_gradient_match_trl(theirs, ours, beta):
  from_trl = _theirs(beta=beta, **theirs)
  advantages_B = jnp.asarray(from_trl[0]["advantages"].numpy())
  _assert_same(_ours(advantages_B, kl_coef=beta, **ours), from_trl)


def test_metrics_match_trl():
  batch, _, _, their_metrics = _theirs()
  *_, metrics = _ours(jnp.asarray(batch["advantages"].numpy()))
  for ours, theirs in {
    "clip_low_fraction": "clip_ratio/low_mean",
    "clip_high_fraction": "clip_ratio/high_mean",
    "kl": "kl",
    "entropy": "entropy",
  }.items():
    mean = metrics[ours].mean
    assert mean > 0.0
    np.testing.assert_allclose(mean, their_metrics[theirs], atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_match_trl(scale):
  batch, *_ = _theirs(scale_rewards=scale)
  rewards_PC = _arguments()[4]
  advantages_PC = advantages.group_advantages(
    rewards_PC,
    ~jnp.isnan(rewards_PC),
    baseline="mean",
    scale=scale,
    min_std=0.0,
  )
  # For equal rewards, TRL keeps the mean's rounding error, divided by 1e-4.
  np.testing.assert_allclose(
    advantages_PC.reshape(_B), batch["advantages"], atol=1e-3
  )
  np.testing.assert_allclose(
    advantages_PC[:2].reshape(-1), batch["advantages"][: 2 * _C], atol=1e-5
  )


@pytest.mark.parametrize(
  ("mode", "ours"),
  [
    ("token_truncate", {}),
    ("token_mask", {"outside": "mask"}),
    ("sequence_truncate", {"level": "sequence"}),
    ("sequence_mask", {"level": "sequence", "outside": "mask"}),
  ],
)
@pytest.mark.parametrize("min_ratio", [None, 0.8])
def test_sampler_weights_match_trl(mode, ours, min_ratio):
  from_trl = _theirs(
    vllm_importance_sampling_mode=mode,
    vllm_importance_sampling_clip_min=min_ratio,
  )
  weigh = {**_TIS, "min_ratio": min_ratio or 0.0, **ours}
  _, old_BT, _, rollout_BT, _, mask_BT = _arguments()
  weights_BT = correction.sampler_weights(old_BT, rollout_BT, mask_BT, **weigh)
  want_BT = np.broadcast_to(from_trl[0]["importance_sampling_ratio"], (_B, _T))
  np.testing.assert_allclose(
    np.where(mask_BT, weights_BT, 1.0),
    np.where(mask_BT, want_BT, 1.0),
    atol=1e-5,
  )
  assert len(np.unique(np.where(mask_BT, weights_BT, 1.0))) > 2
  advantages_B = jnp.asarray(from_trl[0]["advantages"].numpy())
  _assert_same(_ours(advantages_B, weigh=weigh), from_trl)


def _rloo(beta):
  """Returns RLOOTrainer's batch, loss and gradients."""
  trainer_class = rloo_trainer.RLOOTrainer
  completions = [[1] * length for length in _arrays()[-1]]
  trainer = _trainer(
    beta=beta,
    reward_clip_range=None,
    normalize_advantages=False,
    _generate=lambda prompts: (
      [[1]] * len(prompts),
      completions,
      [""] * len(prompts),
    ),
  )
  policy = _Recording(_arrays()[0])
  prompts = [{"prompt": ""}] * _B
  batch = trainer_class._generate_and_score_completions(trainer, prompts)
  loss = trainer_class._compute_loss(trainer, policy, batch)
  loss.backward()
  grads = [policy.logprobs_BT.grad, policy.entropy_BT.grad]
  return batch, loss.item(), grads, {}


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo_matches_trl(beta):
  from_trl = _rloo(beta)
  _, old_BT, ref_BT, _, rewards_PC, mask_BT = _arguments()
  penalty_B = kl.of_sequences(old_BT, ref_BT, mask_BT, estimator="k1")
  advantages_PC = advantages.group_advantages(
    rewards_PC - beta * penalty_B.reshape(_P, _C),
    ~jnp.isnan(rewards_PC),
    baseline="leave_one_out",
    scale="none",
    min_std=0.0,
  )
  np.testing.assert_allclose(
    advantages_PC.reshape(_B), from_trl[0]["advantages"], atol=1e-5
  )
  ours = _ours(
    advantages_PC.reshape(_B),
    weigh={**_TIS, "min_ratio": 1.0, "max_ratio": 1.0},
    ratio="product",
    kl_coef=beta,
    kl_estimator="k1",
    kl_in="reward",
  )
  _assert_same(ours, from_trl)
