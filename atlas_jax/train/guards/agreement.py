# SPDX-License-Identifier: Apache-2.0
"""Compares the sampler's log-probabilities with the trainer's.

Both score the same tokens with the same weights. Differences come from
precision and kernels, or from a fault: stale weights, another tokenizer,
another temperature. docs/agreement.md explains how to find the cause.
"""

import jax
import jax.numpy as jnp

from atlas_jax import errors
from atlas_jax.losses import reduce

METRICS = ("rollout/logprob_gap", "rollout/prob_error", "rollout/kl")


def measure(
  old_logprobs_BT: jax.Array,
  rollout_logprobs_BT: jax.Array,
  loss_mask_BT: jax.Array,
) -> dict[str, jax.Array]:
  """Computes agreement metrics over the sampled tokens.

  With d = old_logprobs - rollout_logprobs, averaged over the masked-in tokens:
  mean |d|, mean exp |d|, and mean exp(d) - 1 - d, Schulman's k3 estimate of
  KL(sampler || trainer).

  Args:
    old_logprobs_BT: from the trainer, at the sampling temperature.
    rollout_logprobs_BT: from the sampler, under the distribution it drew from.
    loss_mask_BT: bool; the tokens that count. Values elsewhere are ignored.

  Returns:
    float32 scalars `rollout/logprob_gap` and `rollout/kl` in nats, and
    `rollout/prob_error`, a ratio of at least 1.
  """
  gap_BT = jnp.where(loss_mask_BT, old_logprobs_BT - rollout_logprobs_BT, 0.0)
  size_BT = jnp.abs(gap_BT)
  return {
    "rollout/logprob_gap": reduce.token_mean(size_BT, loss_mask_BT),
    "rollout/prob_error": reduce.token_mean(jnp.exp(size_BT), loss_mask_BT),
    "rollout/kl": reduce.token_mean(jnp.expm1(gap_BT) - gap_BT, loss_mask_BT),
  }


def check(prob_error: float, *, step: int, max_prob_error: float) -> None:
  """Checks that sampler and trainer agree.

  Raises:
    errors.DivergedError: if `prob_error` is above the bound, or NaN.
  """
  if prob_error <= max_prob_error:
    return
  raise errors.DivergedError(
    f"Trainer and sampler disagree by a factor of {prob_error:.6g} per token.",
    where=f"step {step}, rollout/prob_error; "
    f"--config.agreement.max_prob_error={max_prob_error:g}",
    why="Both scored the same tokens under the same version of the weights, "
    "so the sampler's weights, dtype, temperature or tokenizer differ from the "
    "trainer's.",
    fix="Compare --config.rollout.dtype with --config.model.dtype, then follow "
    "docs/agreement.md. Raise the bound only if you can explain the gap.",
  )
