# SPDX-License-Identifier: Apache-2.0
"""What a model's arithmetic costs, and what a device could do at most.

Model FLOPs are those which the mathematics needs: what is computed again in
the backward pass (see `remat`) is not counted, nor are norms, activations,
rotations and the softmax. A multiplication and an addition are two.
"""

from collections.abc import Sequence

import numpy as np

from atlas_jax.models import decoder_config

# Dense bfloat16 FLOP/s of one JAX device, by how its `device_kind` begins; of
# two names that fit, the first. From the makers' data sheets, without sparsity:
# nvidia.com (B200, H200, H100, A100, L40S, L4, RTX Blackwell and Ada
# architecture papers) and cloud.google.com/tpu/docs (system architecture).
# A device of TPU v2 and v3 is one of a chip's two cores.
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

  A token costs 2 N + 4 L H Q T: N numbers in the kernels it meets, L layers
  of H heads that are Q wide, and T tokens that it sees. T is counted exactly:
  its own position and those before it in its own sequence, as many as the
  window leaves. Taken over a sequence it is half of the T in the paper, which
  counts masked scores too.

  The embedding's table is looked up and not multiplied, so it counts only
  where it is the head as well. Of a mixture count the experts a token goes to.

  Source: Chowdhery et al., arXiv:2204.02311, appendix B.

  Args:
    config: of the model.
    lengths: tokens of each sequence. Packed ones are as many sequences, and
      padding is none.
  """
  return _kernels(config, lengths) + _scores(config, lengths)


def of_update(
  config: decoder_config.DecoderConfig,
  lengths: Sequence[int],
  *,
  is_base_frozen: bool,
) -> float:
  """Counts the model FLOPs of a forward and a backward pass.

  The backward pass costs twice the forward one, 6 N + 12 L H Q T together: a
  product's gradient by its input, and by its kernel.

  Args:
    config: of the model.
    lengths: as in `of_forward`.
    is_base_frozen: whether only adapters are trained. Then kernels have no
      gradient of their own; that of adapters is too small to count.
  """
  kernel_passes = 2 if is_base_frozen else 3
  kernels = kernel_passes * _kernels(config, lengths)
  return kernels + 3 * _scores(config, lengths)


def lengths(segment_ids_BT: np.ndarray) -> list[int]:
  """Counts the tokens of each sequence of a packed batch; 0 is padding."""
  counts = [np.bincount(ids_T)[1:] for ids_T in segment_ids_BT]
  return [int(n) for n in np.concatenate(counts) if n]


def peak(device_kind: str) -> float | None:
  """Gives a device's dense bfloat16 FLOP/s; None if it is unknown."""
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
  """Counts queries times keys, and weights times values."""

  def num_seen(is_local: bool) -> int:
    total = 0
    for length in lengths:
      growing = min(length, config.window or length) if is_local else length
      total += growing * (growing + 1) // 2 + (length - growing) * growing
    return total

  num_local = sum(config.local)
  seen = num_local * num_seen(True)
  seen += (config.num_layers - num_local) * num_seen(False)
  return 4.0 * config.num_heads * config.head_width * seen
