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

METRICS = (
  "rollout/logprob_gap",
  "rollout/logprob_gap_max",
  "rollout/prob_error",
  "rollout/outlier_fraction",
  "rollout/kl",
)

# A token whose probabilities differ by more than this factor is an outlier, and
# counts in `prob_error` as if they differed by this factor. So a bound of 1.02
# stops a run if the probabilities of at least 2 % of the tokens differ, but not
# because of a few tokens: without the limit, one of 51,200 tokens with a gap of
# 7 nats would add exp(7) / 51,200 = 0.021.
OUTLIER_FACTOR = 2.0


def measure(
  old_logprobs_BT: jax.Array,
  rollout_logprobs_BT: jax.Array,
  loss_mask_BT: jax.Array,
) -> dict[str, jax.Array | reduce.Mean]:
  """Computes agreement metrics over the sampled tokens.

  With d = old_logprobs - rollout_logprobs and F = `OUTLIER_FACTOR`, over the
  masked-in tokens: mean and maximum of |d|, mean of min(exp |d|, F), fraction
  with exp |d| > F, and mean of exp(d) - 1 - d, Schulman's k3 estimate of
  KL(sampler || trainer).

  Args:
    old_logprobs_BT: from the trainer, at the sampling temperature.
    rollout_logprobs_BT: from the sampler, under the distribution it drew from.
    loss_mask_BT: bool; the tokens that count. Values elsewhere are ignored.

  Returns:
    `METRICS`: gaps and KL in nats, `rollout/prob_error` as a ratio in [1, F].
  """
  gap_BT = jnp.where(loss_mask_BT, old_logprobs_BT - rollout_logprobs_BT, 0.0)
  size_BT = jnp.abs(gap_BT)
  error_BT = jnp.exp(size_BT)
  k3_BT = jnp.expm1(gap_BT) - gap_BT
  is_outlier_BT = error_BT > OUTLIER_FACTOR
  bounded_BT = jnp.minimum(error_BT, OUTLIER_FACTOR)  # NaN stays NaN.
  return {
    "rollout/logprob_gap": reduce.over_tokens(size_BT, loss_mask_BT),
    "rollout/logprob_gap_max": jnp.max(size_BT),
    "rollout/prob_error": reduce.over_tokens(bounded_BT, loss_mask_BT),
    "rollout/outlier_fraction": reduce.over_tokens(is_outlier_BT, loss_mask_BT),
    "rollout/kl": reduce.over_tokens(k3_BT, loss_mask_BT),
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
