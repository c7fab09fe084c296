# SPDX-License-Identifier: Apache-2.0
"""How far sampler and trainer are apart, and how far is too far.

Both score the same tokens with the same weights, so what remains is precision
and kernels, or a fault: weights that did not arrive, another tokenizer,
another temperature. docs/agreement.md tells them apart.
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
  """Compares the log-probabilities of the sampled tokens.

  With d the trainer's log-probability less the sampler's, over the counted
  tokens: the mean of |d|, the mean of exp |d|, and Schulman's estimate of the
  KL divergence of sampler to trainer, the mean of exp(d) - 1 - d.

  Args:
    old_logprobs_BT: by the trainer, at the sampling temperature.
    rollout_logprobs_BT: by the sampler, of the distribution it drew from.
    loss_mask_BT: bool; the tokens that count. The rest may hold anything.

  Returns:
    float32 scalars `rollout/logprob_gap` and `rollout/kl` in nats, and
    `rollout/prob_error`, a factor of at least 1.
  """
  gap_BT = jnp.where(loss_mask_BT, old_logprobs_BT - rollout_logprobs_BT, 0.0)
  size_BT = jnp.abs(gap_BT)
  return {
    "rollout/logprob_gap": reduce.token_mean(size_BT, loss_mask_BT),
    "rollout/prob_error": reduce.token_mean(jnp.exp(size_BT), loss_mask_BT),
    "rollout/kl": reduce.token_mean(jnp.expm1(gap_BT) - gap_BT, loss_mask_BT),
  }


def check(prob_error: float, *, step: int, max_prob_error: float) -> None:
  """Refuses to train on what the sampler understands otherwise.

  Raises:
    errors.DivergedError: if `prob_error` is above the bound, or no number.
  """
  if prob_error <= max_prob_error:
    return
  raise errors.DivergedError(
    f"Trainer and sampler disagree by a factor of {prob_error:.6g} per token.",
    where=f"step {step}, rollout/prob_error; "
    f"--config.agreement.max_prob_error={max_prob_error:g}",
    why="The same tokens under the same version of the weights: the sampler's "
    "weights, dtype, temperature or tokenizer are not the trainer's.",
    fix="Compare --config.rollout.dtype with --config.model.dtype, then go "
    "through docs/agreement.md. Raise the bound only for a gap that you can "
    "explain.",
  )
