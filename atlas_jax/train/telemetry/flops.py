# SPDX-License-Identifier: Apache-2.0
"""Counts model FLOPs, and lists the peak FLOP/s of devices.

Model FLOPs exclude recomputation in the backward pass (see `remat`), norms,
activations, rotary embeddings and the softmax. A multiply-add counts as two.
"""

from collections.abc import Sequence

import numpy as np

from atlas_jax.models import decoder_config

# Dense bfloat16 FLOP/s of one JAX device, by prefix of its `device_kind`; the
# first match counts. From the vendors' data sheets, without sparsity:
# nvidia.com (B200, H200, H100, A100, L40S, L4, RTX Blackwell and Ada
# architecture papers) and cloud.google.com/tpu/docs (system architecture).
# On TPU v2 and v3, a JAX device is one of a chip's two cores.
_PEAKS = (
  ("NVIDIA GB200", 2500e12),
  ("NVIDIA B200", 2250e12),
  ("NVIDIA H200", 989.4e12),
  ("NVIDIA GH200", 989.4e12),
  ("NVIDIA H100 PCIe", 756e12),
  ("NVIDIA H100 NVL", 835e12),
  ("NVIDIA H100", 989.4e12),
  ("NVIDIA H800", 989.4e12),
  ("NVIDIA A100", 312e12),
  ("NVIDIA A800", 312e12),
  ("NVIDIA L40S", 362e12),
  ("NVIDIA L4", 121e12),
  ("NVIDIA GeForce RTX 5090", 209.5e12),
  ("NVIDIA GeForce RTX 4090", 165.2e12),
  ("TPU v6 lite", 918e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5", 459e12),
  ("TPU v4 lite", 138e12),
  ("TPU v4", 275e12),
  ("TPU v3", 61.5e12),
  ("TPU v2", 23e12),
)


def of_forward(
  config: decoder_config.DecoderConfig, lengths: Sequence[int]
) -> float:
  """Counts the model FLOPs of one forward pass.

  A token costs 2 N + 4 L H Q T, with N parameters in the kernels applied to it,
  L layers, H query heads of width Q, and T tokens it attends to. T is exact:
  the token itself and the earlier tokens of its sequence within the window.
  Averaged over a sequence it is half of the paper's T, which includes masked
  scores.

  The embedding is a lookup, so it counts only if it is tied to the head. In a
  mixture of experts, the chosen experts of a token count.

  Source: Chowdhery et al., arXiv:2204.02311, appendix B.

  Args:
    config: configuration of the model.
    lengths: number of tokens of each sequence, without padding. Packed
      sequences are listed separately.
  """
  return _kernels(config, lengths) + _scores(config, lengths)


def of_update(
  config: decoder_config.DecoderConfig,
  lengths: Sequence[int],
  *,
  is_base_frozen: bool,
) -> float:
  """Counts the model FLOPs of a forward and a backward pass.

  The backward pass costs twice the forward pass, since each product has a
  gradient by its input and one by its kernel: 6 N + 12 L H Q T in total.

  Args:
    config: see `of_forward`.
    lengths: see `of_forward`.
    is_base_frozen: whether only adapters are trained. Then kernel gradients are
      not computed; those of the adapters are negligible and not counted.
  """
  kernel_passes = 2 if is_base_frozen else 3
  kernels = kernel_passes * _kernels(config, lengths)
  return kernels + 3 * _scores(config, lengths)


def lengths(segment_ids_BT: np.ndarray) -> list[int]:
  """Returns the length of each sequence in a packed batch; 0 is padding."""
  counts = [np.bincount(ids_T)[1:] for ids_T in segment_ids_BT]
  return [int(n) for n in np.concatenate(counts) if n]


def peak(device_kind: str) -> float | None:
  """Returns a device's peak dense bfloat16 FLOP/s; None if it is unknown."""
  peaks = (flops for kind, flops in _PEAKS if device_kind.startswith(kind))
  return next(peaks, None)


def _kernels(
  config: decoder_config.DecoderConfig, lengths: Sequence[int]
) -> float:
  heads = 2 * config.num_heads + 2 * config.num_kv_heads
  mlp = 3 * config.width * config.mlp_width
  if experts := config.experts:
    router = config.width * experts.count
    mlp = router + experts.num_chosen * 3 * config.width * experts.width
  layer = heads * config.head_width * config.width + mlp
  head = config.width * config.vocab_size
  return 2.0 * (config.num_layers * layer + head) * sum(lengths)


def _scores(
  config: decoder_config.DecoderConfig, lengths: Sequence[int]
) -> float:
  """Counts the products of queries with keys, and of weights with values."""

  def num_seen(is_local: bool) -> int:
    # Token t attends to min(t + 1, W) tokens, for a window of W. The sum over
    # n tokens is W (W + 1) / 2 + (n - W) W, with W = n without a window.
    total = 0
    for length in lengths:
      window = min(length, config.window or length) if is_local else length
      total += window * (window + 1) // 2 + (length - window) * window
    return total

  num_local = sum(config.local)
  seen = num_local * num_seen(True)
  seen += (config.num_layers - num_local) * num_seen(False)
  return 4.0 * config.num_heads * config.head_width * seen
