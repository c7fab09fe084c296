# SPDX-License-Identifier: Apache-2.0
"""The GRPO loss against TRL's own methods on the same arrays.

`GRPOTrainer` is never built: its methods run on a stand-in for `self` whose
models return recorded log-probabilities, so TRL's code sees our arrays.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.losses import grpo

torch = pytest.importorskip("torch")
grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")

_P, _C, _T = 3, 4, 8
_B = _P * _C
_CLIP_LOW, _CLIP_HIGH, _MAX_RATIO = 0.2, 0.28, 1.5


class _Recording(torch.nn.Module):
  """A model that only knows the log-probabilities it once returned."""

  is_gradient_checkpointing = False

  def __init__(self, logprobs_BT):
    super().__init__()
    self.logprobs_BT = torch.nn.Parameter(torch.tensor(logprobs_BT))


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


def _trainer(loss_type, beta):
  """Stands in for a GRPOTrainer, as its __init__ would have left it."""
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
    use_bias_correction_kl=False,
    delta=None,
  )
  accelerator = types.SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    process_index=0,
    sync_gradients=True,
    gather=lambda x: x,
    reduce=lambda x, **_: x,
  )
  return types.SimpleNamespace(
    args=args,
    accelerator=accelerator,
    model=_Recording(old_BT),
    ref_model=_Recording(ref_BT),
    loss_type=loss_type,
    beta=beta,
    epsilon_low=_CLIP_LOW,
    epsilon_high=_CLIP_HIGH,
    importance_sampling_level="token",
    use_vllm=True,
    vllm_importance_sampling_correction=True,
    vllm_importance_sampling_mode="token_truncate",
    vllm_importance_sampling_clip_min=None,
    vllm_importance_sampling_clip_max=_MAX_RATIO,
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
    _entropy_bonus_enabled=False,
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
      torch.zeros(_B, _T),
      None,
    ),
  )


def _theirs(loss_type, beta):
  """Returns TRL's batch, loss, gradient and metrics."""
  trainer_class = grpo_trainer.GRPOTrainer
  trainer, policy = _trainer(loss_type, beta), _Recording(_arrays()[0])
  prompts = [{"prompt": ""}] * _B
  batch = trainer_class._generate_and_score_completions(trainer, prompts)
  loss = trainer_class._compute_loss(trainer, policy, batch)
  loss.backward()
  return batch, loss.item(), policy.logprobs_BT.grad, trainer._metrics["train"]


def _ours(aggregate, kl_coef):
  """Returns our advantages, weights, loss, gradient and metrics."""
  logprobs_BT, old_BT, ref_BT, rollout_BT, rewards_PC, lengths_B = map(
    jnp.asarray, _arrays()
  )
  mask_BT = jnp.arange(_T) < lengths_B[:, None]
  advantages_PC = grpo.group_advantages(
    rewards_PC, ~jnp.isnan(rewards_PC), scale_by_std=True
  )
  weights_BT = grpo.sampler_correction(
    old_BT, rollout_BT, mask_BT, max_ratio=_MAX_RATIO
  )

  def loss(logprobs_BT):
    return grpo.clipped_surrogate(
      logprobs_BT,
      old_BT,
      ref_BT,
      advantages_PC.reshape(_B),
      mask_BT,
      rollout_weights_BT=weights_BT,
      clip_low=_CLIP_LOW,
      clip_high=_CLIP_HIGH,
      kl_coef=kl_coef,
      aggregate=aggregate,
    )

  (value, metrics), grad_BT = jax.value_and_grad(loss, has_aux=True)(
    logprobs_BT
  )
  return advantages_PC, weights_BT, value, grad_BT, metrics


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
  ("loss_type", "aggregate"),
  [("grpo", "sequence_mean"), ("bnpo", "token_mean"), ("dapo", "token_mean")],
)
def test_loss_gradient_and_metrics_are_trls(loss_type, aggregate, beta):
  _, want, want_grad_BT, their_metrics = _theirs(loss_type, beta)
  _, _, loss, grad_BT, metrics = _ours(aggregate, beta)

  np.testing.assert_allclose(loss, want, atol=1e-5)
  np.testing.assert_allclose(grad_BT, want_grad_BT, atol=1e-5)
  for ours, theirs in {
    "clip_low_fraction": "clip_ratio/low_mean",
    "clip_high_fraction": "clip_ratio/high_mean",
    **({"kl": "kl"} if beta else {}),
  }.items():
    assert metrics[ours] > 0.0
    np.testing.assert_allclose(metrics[ours], their_metrics[theirs], atol=1e-5)


def test_advantages_and_sampler_weights_are_trls():
  batch, *_ = _theirs("grpo", 0.04)
  advantages_PC, weights_BT, *_ = _ours("sequence_mean", 0.04)

  # Of equal rewards TRL keeps the rounding error of their mean, over 1e-4.
  np.testing.assert_allclose(
    advantages_PC.reshape(_B), batch["advantages"], atol=1e-3
  )
  np.testing.assert_allclose(
    advantages_PC[:2].reshape(-1), batch["advantages"][: 2 * _C], atol=1e-5
  )
  np.testing.assert_allclose(
    weights_BT, batch["importance_sampling_ratio"], atol=1e-5
  )
  assert weights_BT.max() == _MAX_RATIO
