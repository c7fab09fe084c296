# SPDX-License-Identifier: Apache-2.0
"""Generalized Jensen-Shannon divergence between a student and its teacher."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from atlas_jax.losses import chunks, logprobs


class Output(NamedTuple):
  """Hidden states and head of a model; see `chunks.project`."""

  hidden_BTD: jax.Array
  head_DV: jax.Array
  soft_cap: float | None


class TokenStats(NamedTuple):
  """Distillation statistics of each token, [B, T].

  `divergence` is float32, in nats, and the only field with a gradient.
  `logprobs` (student) and `teacher_logprobs` are the float32 log-probabilities
  of the targets, at temperature 1 and over each model's full vocabulary.
  `is_likeliest` is bool: whether no token is more likely for the student than
  the target.
  """

  divergence: jax.Array
  logprobs: jax.Array
  teacher_logprobs: jax.Array
  is_likeliest: jax.Array


def generalized_jsd(
  student_logits_BTV: jax.Array,
  teacher_logits_BTV: jax.Array,
  *,
  beta: float,
  temperature: float,
) -> jax.Array:
  """Computes the generalized Jensen-Shannon divergence at every position.

  With P the teacher, Q the student and M = beta P + (1 - beta) Q, this is
  beta KL(P || M) + (1 - beta) KL(Q || M). It vanishes at both end points, where
  its limits over beta and over 1 - beta are used instead: beta = 0 is
  KL(P || Q), which covers all modes of the teacher, and beta = 1 is
  KL(Q || P), which seeks its main mode.

  TRL's `generalized_jsd_loss` (1.16) has the same beta and temperature; its
  "batchmean" is `reduce.token_mean` of this. TRL 0.14, used to train ATLAS,
  swaps P and Q in M and has no temperature: it matches this at beta = 0.5 and
  temperature 1, and is not this divergence at any other beta.

  Source: Agarwal et al., arXiv:2306.13649, equation 1 and section 3.

  Args:
    student_logits_BTV: float logits of any precision; computed in float32.
    teacher_logits_BTV: the same, over the same vocabulary. No gradient flows
      through it.
    beta: weight of the teacher in the mixture, in [0, 1].
    temperature: divides both logits; 1.0 leaves them unchanged.

  Returns:
    The divergence in nats, float32[B, T].

  Raises:
    ValueError: if `beta` is outside [0, 1], `temperature` is not positive, or
      the vocabularies differ.
  """
  _check(beta, temperature)
  sizes = student_logits_BTV.shape[-1], teacher_logits_BTV.shape[-1]
  if sizes[0] != sizes[1]:
    raise ValueError(
      "Student and teacher must have the same vocabulary, got vocabularies of "
      f"{sizes[0]} and {sizes[1]} tokens."
    )
  teacher_logits_BTV = jax.lax.stop_gradient(teacher_logits_BTV)
  log_p_BTV, log_q_BTV = (
    jax.nn.log_softmax(logits_BTV.astype(jnp.float32) / temperature)
    for logits_BTV in (teacher_logits_BTV, student_logits_BTV)
  )
  if beta == 0.0:
    return _kl(log_p_BTV, log_q_BTV)
  if beta == 1.0:
    return _kl(log_q_BTV, log_p_BTV)
  log_m_BTV = jnp.logaddexp(
    math.log(beta) + log_p_BTV, math.log1p(-beta) + log_q_BTV
  )
  return beta * _kl(log_p_BTV, log_m_BTV) + (1.0 - beta) * _kl(
    log_q_BTV, log_m_BTV
  )


def of_outputs(
  student: Output,
  teacher: Output,
  targets_BT: jax.Array,
  *,
  beta: float,
  temperature: float,
  chunk_tokens: int,
) -> TokenStats:
  """Computes the divergence and target log-probabilities, in chunks.

  Equals `generalized_jsd` of both models' logits, but no array of B x T x V
  elements ever exists, forward or backward.

  Checkpoints may pad their vocabularies to different sizes. The divergence is
  over the tokens that both heads have, which are the first.

  Args:
    student: its hidden states and head get gradients.
    teacher: gets no gradient. Its width may differ.
    targets_BT: the token that each position predicts, in both vocabularies; the
      caller shifts.
    beta: see `generalized_jsd`.
    temperature: see `generalized_jsd`.
    chunk_tokens: tokens of each sequence whose logits exist at one time.

  Raises:
    ValueError: see `generalized_jsd`, or if `chunk_tokens` is not positive.
  """
  _check(beta, temperature)
  num_shared = min(student.head_DV.shape[-1], teacher.head_DV.shape[-1])

  def stats_of_chunk(
    chunk: tuple[jax.Array, jax.Array, jax.Array],
  ) -> TokenStats:
    hidden_BTD, hidden_BTE, targets_BT = chunk
    student_BTV = chunks.project(
      hidden_BTD, student.head_DV, soft_cap=student.soft_cap
    )
    teacher_BTV = chunks.project(
      hidden_BTE, teacher.head_DV, soft_cap=teacher.soft_cap
    )
    divergence_BT = generalized_jsd(
      student_BTV[..., :num_shared],
      teacher_BTV[..., :num_shared],
      beta=beta,
      temperature=temperature,
    )
    student_stats, teacher_stats = (
      logprobs.from_logits(
        jax.lax.stop_gradient(logits_BTV), targets_BT, temperature=1.0
      )
      for logits_BTV in (student_BTV, teacher_BTV)
    )
    return TokenStats(
      divergence=divergence_BT,
      logprobs=student_stats.logprobs,
      teacher_logprobs=teacher_stats.logprobs,
      is_likeliest=student_stats.is_likeliest,
    )

  return chunks.map_tokens(
    stats_of_chunk,
    (student.hidden_BTD, teacher.hidden_BTD, targets_BT),
    chunk_tokens=chunk_tokens,
  )


def _check(beta: float, temperature: float) -> None:
  if not 0.0 <= beta <= 1.0:
    raise ValueError(
      f"beta, the weight of the teacher, must be in [0, 1], got {beta}."
    )
  if temperature <= 0.0:
    raise ValueError(f"temperature must be > 0, got {temperature}.")


def _kl(log_p_BTV: jax.Array, log_q_BTV: jax.Array) -> jax.Array:
  """Computes KL(P || Q) at every position."""
  return jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)
