# SPDX-License-Identifier: Apache-2.0
"""Divergence against the paper, and memory of its chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.losses import gkd, logprobs, reduce

_B, _T, _V = 2, 37, 101
_D, _E = 5, 7  # Widths of the student and the teacher.
_HYPER = {"beta": 0.3, "temperature": 0.8}


def _logits(seed=0):
  return np.random.default_rng(seed).normal(size=(2, _B, _T, _V))


def _softmax(logits_BTV):
  exp_BTV = np.exp(logits_BTV)
  return exp_BTV / exp_BTV.sum(-1, keepdims=True)


def _kl(p_BTV, q_BTV):
  return (p_BTV * np.log(p_BTV / q_BTV)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.3, 0.5, 1.0])
def test_divergence_is_equation_1_with_the_teacher_as_p(beta, temperature):
  student_BTV, teacher_BTV = _logits()
  q_BTV, p_BTV = (_softmax(x / temperature) for x in (student_BTV, teacher_BTV))
  m_BTV = beta * p_BTV + (1 - beta) * q_BTV
  want_BT = beta * _kl(p_BTV, m_BTV) + (1 - beta) * _kl(q_BTV, m_BTV)
  if beta in (0.0, 1.0):
    want_BT = _kl(p_BTV, q_BTV) if beta == 0.0 else _kl(q_BTV, p_BTV)
  got_BT = gkd.generalized_jsd(
    jnp.asarray(student_BTV),
    jnp.asarray(teacher_BTV),
    beta=beta,
    temperature=temperature,
  )
  assert got_BT.dtype == jnp.float32
  np.testing.assert_allclose(got_BT, want_BT, atol=2e-6)


@pytest.mark.parametrize(("end", "inside"), [(0.0, 1e-3), (1.0, 1.0 - 1e-3)])
def test_end_points_are_the_limits_of_the_interior(end, inside):
  """See section 3 of the paper: over beta, and over 1 - beta."""
  logits = [jnp.asarray(x, jnp.float32) for x in _logits()]
  at_end_BT, near_BT = (
    gkd.generalized_jsd(*logits, beta=beta, temperature=1.0)
    for beta in (end, inside)
  )
  np.testing.assert_allclose(near_BT / 1e-3, at_end_BT, rtol=0.05)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_equal_models_have_zero_divergence_and_gradient(beta):
  logits_BTV = jnp.asarray(_logits()[0])

  def total(student_BTV):
    divergence_BT = gkd.generalized_jsd(
      student_BTV, logits_BTV, beta=beta, temperature=1.0
    )
    return divergence_BT.sum(), divergence_BT

  grad_BTV, divergence_BT = jax.grad(total, has_aux=True)(logits_BTV)
  np.testing.assert_allclose(divergence_BT, 0.0, atol=1e-6)
  np.testing.assert_allclose(grad_BTV, 0.0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_huge_bfloat16_logits_stay_finite(beta):
  student_BTV = jnp.array([[[3e4, -3e4, 0.0]]], jnp.bfloat16)

  def total(student_BTV):
    return gkd.generalized_jsd(
      student_BTV, -student_BTV, beta=beta, temperature=1.0
    ).sum()

  value, grad_BTV = jax.value_and_grad(total)(student_BTV)
  assert jnp.isfinite(value)
  assert jnp.isfinite(grad_BTV.astype(jnp.float32)).all()


@pytest.mark.parametrize("garbage", [0.0, 1e9, -1e9])
def test_masked_tokens_change_neither_loss_nor_gradient(garbage):
  student_BTV, teacher_BTV = map(jnp.asarray, _logits())
  mask_BT = jnp.asarray(np.random.default_rng(1).random((_B, _T)) < 0.5)

  def loss(student_BTV, teacher_BTV):
    divergence_BT = gkd.generalized_jsd(student_BTV, teacher_BTV, **_HYPER)
    return reduce.token_mean(divergence_BT, mask_BT)

  def dirty(x_BTV):
    spoilt_BTV = x_BTV.at[..., 0].set(garbage)
    return jnp.where(mask_BT[..., None], x_BTV, spoilt_BTV)

  clean = jax.value_and_grad(loss)(student_BTV, teacher_BTV)
  spoilt = jax.value_and_grad(loss)(dirty(student_BTV), dirty(teacher_BTV))
  jax.tree.map(np.testing.assert_array_equal, spoilt, clean)


def _outputs(num_shared=_V, dtype=jnp.float32):
  """Draws two models' outputs; the teacher's head may be wider."""
  keys = jax.random.split(jax.random.key(0), 5)
  student = gkd.Output(
    jax.random.normal(keys[0], (_B, _T, _D), dtype),
    jax.random.normal(keys[1], (_D, num_shared)),
    None,
  )
  teacher = gkd.Output(
    jax.random.normal(keys[2], (_B, _T, _E), dtype),
    jax.random.normal(keys[3], (_E, _V)),
    3.0,
  )
  return student, teacher, jax.random.randint(keys[4], (_B, _T), 0, num_shared)


def _whole(student, teacher, targets_BT):
  """Computes the same statistics from full logits."""
  student_BTV = student.hidden_BTD @ student.head_DV
  teacher_BTV = 3.0 * jnp.tanh(teacher.hidden_BTD @ teacher.head_DV / 3.0)
  stats, theirs = (
    logprobs.from_logits(x_BTV, targets_BT, temperature=1.0)
    for x_BTV in (student_BTV, teacher_BTV)
  )
  num_shared = student_BTV.shape[-1]
  return gkd.TokenStats(
    gkd.generalized_jsd(student_BTV, teacher_BTV[..., :num_shared], **_HYPER),
    stats.logprobs,
    theirs.logprobs,
    stats.is_likeliest,
  )


@pytest.mark.parametrize("num_shared", [_V, _V - 4])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 512])
def test_chunks_change_neither_values_nor_gradients(chunk_tokens, num_shared):
  student, teacher, targets_BT = _outputs(num_shared)
  weights_BT = np.random.default_rng(1).normal(size=(_B, _T))

  def chunked(student, teacher):
    return gkd.of_outputs(
      student, teacher, targets_BT, chunk_tokens=chunk_tokens, **_HYPER
    )

  def whole(student, teacher):
    return _whole(student, teacher, targets_BT)

  def of(function):
    def total(hidden_BTD, head_DV):
      stats = function(gkd.Output(hidden_BTD, head_DV, None), teacher)
      return jnp.sum(stats.divergence * weights_BT), stats

    grad = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    return grad(student.hidden_BTD, student.head_DV)

  for got, want in zip(
    *map(jax.tree.leaves, (of(chunked), of(whole))), strict=True
  ):
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)


def test_only_the_divergence_has_a_gradient_and_only_to_the_student():
  student, teacher, targets_BT = _outputs()

  def total(name):
    def of(arrays):
      stats = gkd.of_outputs(
        gkd.Output(*arrays[:2], None),
        gkd.Output(*arrays[2:], 3.0),
        targets_BT,
        chunk_tokens=8,
        **_HYPER,
      )
      return getattr(stats, name).sum()

    return jax.grad(of)((*student[:2], *teacher[:2]))

  *ours, hidden_BTE, head_EV = total("divergence")
  assert all(jnp.abs(grad).max() > 1e-3 for grad in ours)
  assert not hidden_BTE.any()
  assert not head_EV.any()
  for name in ("logprobs", "teacher_logprobs"):
    assert not any(grad.any() for grad in total(name))


def _temporary_bytes(chunk_tokens, num_tokens, num_words):
  """Compiles the gradient of every statistic; returns its memory."""

  def loss(student_hidden_BTD, student_head_DV, teacher):
    stats = gkd.of_outputs(
      gkd.Output(student_hidden_BTD, student_head_DV, None),
      gkd.Output(*teacher, None),
      jnp.zeros((_B, num_tokens), int),
      chunk_tokens=chunk_tokens,
      **_HYPER,
    )
    return jnp.sum(stats.divergence), stats

  args = (
    jnp.ones((_B, num_tokens, 4)),
    jnp.ones((4, num_words)),
    (jnp.ones((_B, num_tokens, 6)), jnp.ones((6, num_words))),
  )
  step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  return step.lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_compiled_memory_does_not_grow_with_vocabulary_times_sequence():
  short = _temporary_bytes(8, 64, 1024)
  long = _temporary_bytes(8, 512, 1024)
  # The rest is hidden states and statistics, a few numbers per token.
  assert long - short < 128 * _B * (512 - 64)
  assert long < 0.3 * 4 * _B * 512 * 1024
  # With one chunk it does grow, so the bounds above are meaningful.
  assert _temporary_bytes(512, 512, 1024) >= 4 * _B * 512 * 1024


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_must_be_in_the_unit_interval(beta):
  with pytest.raises(ValueError, match="beta"):
    gkd.generalized_jsd(*_logits(), beta=beta, temperature=1.0)


def test_temperature_must_be_positive():
  with pytest.raises(ValueError, match="temperature"):
    gkd.generalized_jsd(*_logits(), beta=0.5, temperature=0.0)


def test_vocabularies_must_match():
  student_BTV, teacher_BTV = _logits()
  with pytest.raises(ValueError, match="vocabularies of 101 and 100"):
    gkd.generalized_jsd(student_BTV, teacher_BTV[..., 1:], **_HYPER)


def test_sharded_heads_and_batch_match_unsharded():
  student, teacher, targets_BT = _outputs(_V - 1)
  teacher = teacher._replace(head_DV=teacher.head_DV[:, : _V - 1])
  mesh = jax.make_mesh(
    (2, 4), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2
  )

  def on(x, *axes):
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*axes)))

  def place(output):
    return on(output.hidden_BTD, "data"), on(output.head_DV, None, "tensor")

  def loss(ours, theirs, targets_BT):
    stats = gkd.of_outputs(
      gkd.Output(*ours, None),
      gkd.Output(*theirs, 3.0),
      targets_BT,
      chunk_tokens=8,
      **_HYPER,
    )
    return stats.divergence.sum()

  step = jax.jit(jax.value_and_grad(loss))
  want = step(student[:2], teacher[:2], targets_BT)
  got = step(place(student), place(teacher), on(targets_BT, "data"))
  for got_leaf, want_leaf in zip(
    *map(jax.tree.leaves, (got, want)), strict=True
  ):
    np.testing.assert_allclose(got_leaf, want_leaf, atol=2e-5, rtol=1e-5)
