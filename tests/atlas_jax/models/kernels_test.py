# SPDX-License-Identifier: Apache-2.0
"""Attention kernels against NumPy, and rejected ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors, sharding
from atlas_jax.models import kernels
from tests import tiny

_LENGTHS = ((5, 60, 2), (1, 140))  # Segment lengths of each row.
_NUM_TOKENS = 145
_KERNELS = {
  "reference": functools.partial(kernels.make, "reference"),
  "xla": functools.partial(kernels.make, "xla"),
  "xla_any_keys": lambda mask, tokens: kernels.make(
    "xla", mask, tokens, tokens
  ),
  "splash": functools.partial(kernels.splash, layout=None, interpret=True),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
  """Shrinks tiles, so that short rows span several."""
  monkeypatch.setattr(kernels, "_MAX_SPLASH_BLOCK", 128)


def _tokens(lengths, num_tokens):
  """Packs segments of the given lengths into rows, followed by padding."""
  shape = (len(lengths), num_tokens)
  positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  for row, sizes in enumerate(lengths):
    start = 0
    for segment, size in enumerate(sizes, start=1):
      positions[row, start : start + size] = np.arange(size)
      segments[row, start : start + size] = segment
      start += size
  return kernels.Tokens(jnp.asarray(positions), jnp.asarray(segments))


def _draw(num_rows, num_tokens, *, heads=4, kv_heads=2, width=8):
  keys = jax.random.split(jax.random.key(0), 4)
  return [
    jax.random.normal(key, (num_rows, num_tokens, count, width))
    for key, count in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
  ]


def _in_numpy(q_TNH, k_TKH, v_TKH, mask):
  """Computes attention within one sequence, in NumPy."""
  mixed = np.zeros(q_TNH.shape)
  at = np.arange(len(q_TNH))
  distance = at[:, None] - at
  seen = (distance >= 0) & (distance < (mask.window or np.inf))
  for head in range(q_TNH.shape[1]):
    # Neighbouring query heads share a key/value head.
    shared = head // (q_TNH.shape[1] // k_TKH.shape[1])
    scores = mask.scale * q_TNH[:, head] @ k_TKH[:, shared].T
    if mask.soft_cap:
      scores = mask.soft_cap * np.tanh(scores / mask.soft_cap)
    weights = np.exp(np.where(seen, scores, -np.inf))
    weights /= weights.sum(axis=1, keepdims=True)
    mixed[:, head] = weights @ v_TKH[:, shared]
  return mixed


def _attend(kernel, mask, tokens, q, k, v):
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  return _KERNELS[kernel](mask, tokens)(q, k, v)


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("soft_cap", [None, 0.5])
def test_attention_within_segments_matches_numpy(kernel, window, soft_cap):
  mask = kernels.Mask(window, 0.4, soft_cap)
  tokens = _tokens(_LENGTHS, _NUM_TOKENS)
  q, k, v, _ = _draw(2, _NUM_TOKENS)

  got = _attend(kernel, mask, tokens, q, k, v)

  for row, sizes in enumerate(_LENGTHS):
    start = 0
    for size in sizes:
      own = (row, slice(start, start + size))
      q64, k64, v64 = (np.asarray(x[own], np.float64) for x in (q, k, v))
      expected = _in_numpy(q64, k64, v64, mask)
      np.testing.assert_allclose(got[own], expected, rtol=1e-4, atol=1e-5)
      start += size


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.parametrize("window", [None, 7])
def test_packed_equals_unpacked_in_value_and_gradient(kernel, window):
  mask = kernels.Mask(window, 0.4, 1.5)
  sizes = (5, 20, 120)
  packed, apart = _tokens([sizes], 145), _tokens([[n] for n in sizes], 120)
  *qkv, weights = _draw(1, 145)
  spans = np.split(np.arange(145), np.cumsum(sizes)[:-1])

  def unpack(x):
    rows = [
      jnp.pad(x[0, span], ((0, 120 - len(span)), (0, 0), (0, 0)))
      for span in spans
    ]
    return jnp.stack(rows)

  def of_packed(q, k, v):
    return jnp.sum(weights * _attend(kernel, mask, packed, q, k, v))

  def of_unpacked(q, k, v):
    # Loss weights are 0 on padding, which adds nothing to the gradient.
    rows = _attend("reference", mask, apart, *map(unpack, (q, k, v)))
    return jnp.sum(unpack(weights) * rows)

  got = jax.jit(jax.value_and_grad(of_packed, argnums=(0, 1, 2)))(*qkv)
  expected = jax.jit(jax.value_and_grad(of_unpacked, argnums=(0, 1, 2)))(*qkv)

  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_splash_kernel_is_sharded_over_a_mesh():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  rows = sharding.of_batch(mesh)
  mask = kernels.Mask(7, 0.4, None)
  tokens = _tokens(_LENGTHS * 2, _NUM_TOKENS)
  *qkv, weights = _draw(4, _NUM_TOKENS)

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_grad(rows, tokens, *qkv):
    def loss(q, k, v):
      k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
      attend = kernels.splash(mask, tokens, layout=rows, interpret=True)
      return jnp.sum(
        (tokens.segment_ids_BT > 0) * jnp.sum(weights * attend(q, k, v), (2, 3))
      )

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(*qkv)

  expected = value_and_grad(None, tokens, *qkv)
  got = value_and_grad(rows, *jax.device_put((tokens, *qkv), rows))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_padding_neither_attends_nor_is_attended_to():
  tokens = _tokens([(2, 2)], 5)
  seen = kernels.Mask(None, 1.0, None).dense(tokens, tokens)
  expected = [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [0, 0, 1, 0, 0],
    [0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0],
  ]
  np.testing.assert_array_equal(seen[0], np.array(expected, bool))


def test_window_includes_the_query_itself():
  tokens = _tokens([(6,)], 6)
  seen = kernels.Mask(3, 1.0, None).dense(tokens, tokens)
  np.testing.assert_array_equal(seen[0].sum(axis=1), [1, 2, 3, 3, 3, 3])
  assert seen[0, 5, 3:].all()


@pytest.mark.parametrize("kernel", ["reference", "xla"])
def test_softmax_is_in_float32(kernel):
  tokens = _tokens([(600,)], 600)
  attend = kernels.make(kernel, kernels.Mask(None, 1.0, None), tokens)
  q, k, v, _ = (x.astype(jnp.bfloat16) for x in _draw(1, 600))
  jaxpr = jax.make_jaxpr(attend)(q, k.swapaxes(1, 2), v.swapaxes(1, 2))
  exps = [line for line in str(jaxpr).splitlines() if " = exp " in line]
  assert exps
  assert all(":f32[" in line for line in exps)


def test_gradients_of_blocks_are_summed_in_float32():
  tokens = _tokens([(1024,)], 1024)
  mask = kernels.Mask(None, 0.4, None)
  *in_bf16, weights = (x.astype(jnp.bfloat16) for x in _draw(1, 1024))

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(kernel, *qkv):
    def loss(k, v):
      mixed = _attend(kernel, mask, tokens, qkv[0], k, v)
      return jnp.sum((1.0 + weights.astype(jnp.float32)) * mixed)

    return jax.grad(loss, argnums=(0, 1))(*qkv[1:])

  exact = gradients("reference", *(x.astype(jnp.float32) for x in in_bf16))
  whole, blocks = (
    [
      jnp.abs(got - expected).mean()
      for got, expected in zip(gradients(k, *in_bf16), exact, strict=True)
    ]
    for k in ("reference", "xla")
  )
  # Summed in bfloat16, the error over 16 blocks is 1.8 times as large.
  assert blocks[0] < 1.4 * whole[0]
  assert blocks[1] < 1.4 * whole[1]


def test_keys_after_a_span_or_outside_its_window_are_not_read():
  tokens = _tokens([(256,)], 256)  # Four spans.
  q, k, v, _ = _draw(1, 256)
  nan_at = {
    "start": v.at[:, :64].set(jnp.nan),
    "end": v.at[:, -64:].set(jnp.nan),
  }

  def finite(window, where):
    mask = kernels.Mask(window, 0.4, None)
    mixed = _attend("xla", mask, tokens, q, k, nan_at[where])
    return jnp.isfinite(mixed).all(axis=(0, 2, 3))

  np.testing.assert_array_equal(finite(None, "end"), np.arange(256) < 192)
  np.testing.assert_array_equal(finite(7, "start"), np.arange(256) >= 128)


@pytest.mark.parametrize("kernel", ["reference", "xla", "splash"])
def test_saved_attention_outputs_are_not_recomputed(kernel):
  tokens = _tokens([(256,)], 256)
  q, *kv, weights = _draw(1, 256)

  def num_products(policy):
    # In a loop, so that the compiler keeps the recomputation.
    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def layer(x, kv):
      mask = kernels.Mask(None, 0.4, None)
      return jnp.sin(weights * _attend(kernel, mask, tokens, x, *kv)), None

    def loss(x, kv_of_layers):
      return jnp.sum(jax.lax.scan(layer, x, kv_of_layers)[0])

    args = (q, [jnp.stack([x, x, x]) for x in kv])
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return gradient.lower(*args).compile().as_text().count(" dot(")

  keep = jax.checkpoint_policies.save_only_these_names(kernels.MIXED)
  again = jax.checkpoint_policies.nothing_saveable
  assert num_products(keep) < num_products(again)


def test_long_rows_need_no_full_score_matrix():
  def peak(kernel, num_tokens):
    def loss(q, k, v, tokens):
      mask = kernels.Mask(None, 0.4, None)
      return jnp.sum(_attend(kernel, mask, tokens, q, k, v))

    args = (*_draw(1, num_tokens)[:3], _tokens([(num_tokens,)], num_tokens))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    analysis = gradient.lower(*args).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes

  all_scores = 4 * 2048 * 2048 * 4  # Bytes, of 4 heads.
  assert peak("reference", 2048) > all_scores
  assert peak("xla", 2048) < all_scores / 4
  assert peak("xla", 2048) < 2.5 * peak("xla", 1024)


_ABLE = {"head_width": 128, "dtype": jnp.dtype("bfloat16"), "soft_cap": None}


@pytest.mark.parametrize(
  ("platform", "changes", "expected"),
  [
    ("cpu", {}, "xla"),
    ("gpu", {}, "cudnn"),
    ("gpu", {"soft_cap": 50.0}, "xla"),
    ("gpu", {"dtype": jnp.dtype("float32")}, "xla"),
    ("tpu", {}, "splash"),
    ("tpu", {"soft_cap": 50.0}, "splash"),
  ],
)
def test_auto_selects_the_fastest_supported_kernel(platform, changes, expected):
  got = kernels.choose("auto", platform=platform, **{**_ABLE, **changes})
  assert got == expected


@pytest.mark.parametrize(
  ("backend", "platform", "changes", "why"),
  [
    ("cudnn", "cpu", {}, "platform is cpu"),
    ("cudnn", "gpu", {"soft_cap": 50.0}, "no soft cap"),
    ("cudnn", "gpu", {"head_width": 36}, "got 36"),
    ("cudnn", "gpu", {"dtype": jnp.dtype("float32")}, "got float32"),
    ("splash", "gpu", {}, "platform is gpu"),
    ("flash", "gpu", {}, "kernel is unknown"),
  ],
)
def test_unsupported_kernel_is_rejected(backend, platform, changes, why):
  with pytest.raises(errors.ConfigError, match=why):
    kernels.choose(backend, platform=platform, **{**_ABLE, **changes})


def test_build_rejects_an_unsupported_kernel():
  with pytest.raises(errors.ConfigError, match="attention=cudnn"):
    tiny.build("gemma2", attention="cudnn")
