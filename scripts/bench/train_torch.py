# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of `scripts.bench.train`, imported only in its process."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from scripts.bench import memory


def make(
  what: str,
  fields: Mapping[str, Any],  # Any: JSON.
  sequences: Sequence[np.ndarray],
  *,
  dtype: str,
  rate: float,
  is_compiled: bool,
  has_checkpoints: bool,
) -> tuple[Callable[[], None], Callable[[], int], str]:
  """Creates a training step of transformers' model on padded sequences.

  Args:
    what: "sft", or "grpo" for the clipped surrogate of one update.
    fields: the config.json of a Qwen3.
    sequences: token ids of each sequence.
    dtype: "bfloat16" uses autocast; parameters are always float32.
    rate: learning rate of AdamW.
    is_compiled: whether to use `torch.compile`.
    has_checkpoints: whether to use gradient checkpointing.

  Returns:
    A function that runs a step and synchronizes, a function that returns the
    peak bytes, and the device's name.
  """
  is_gpu = torch.cuda.is_available()
  device = "cuda" if is_gpu else "cpu"
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(
    transformers.Qwen3Config(**fields), attn_implementation="sdpa"
  ).to(device)
  if has_checkpoints:
    model.gradient_checkpointing_enable()
  # Any: a module or a compiled function, called alike.
  forward: Any = torch.compile(model) if is_compiled else model
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=rate, weight_decay=0.0, fused=True
  )
  ids, mask = _pad(sequences, device)
  # Without a mask, sdpa selects its fastest kernel.
  attention = {} if bool(mask.all()) else {"attention_mask": mask}
  labels = ids.masked_fill(mask == 0, -100)
  counted = mask[:, 1:].float()
  advantages = torch.arange(len(ids), device=device)[:, None] % 2 * 2.0 - 1.0

  def loss() -> torch.Tensor:
    if what == "sft":
      return forward(input_ids=ids, labels=labels, **attention).loss
    logits = forward(input_ids=ids, **attention).logits[:, :-1].float()
    picked = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
    logprobs = picked - logits.logsumexp(-1)
    ratio = (logprobs - logprobs.detach()).exp()
    clipped = ratio.clamp(0.8, 1.2) * advantages
    gain = torch.minimum(ratio * advantages, clipped)
    return -(gain * counted).sum() / counted.sum()

  def step() -> None:
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
      value = loss()
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if is_gpu:
      torch.cuda.synchronize()

  if is_gpu:
    name = torch.cuda.get_device_name()
    return step, torch.cuda.max_memory_allocated, name
  return step, memory.peak_bytes, "cpu"


def _pad(
  sequences: Sequence[np.ndarray], device: str
) -> tuple[torch.Tensor, torch.Tensor]:
  """Pads each sequence to a row; the mask is 0 on padding."""
  shape = (len(sequences), max(map(len, sequences)))
  ids = torch.zeros(shape, dtype=torch.long)
  mask = torch.zeros_like(ids)
  for row, sequence in enumerate(sequences):
    ids[row, : len(sequence)] = torch.from_numpy(sequence)
    mask[row, : len(sequence)] = 1
  return ids.to(device), mask.to(device)
