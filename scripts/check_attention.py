# SPDX-License-Identifier: Apache-2.0
"""Compares the attention kernels on the available device.

  python -m scripts.check_attention --length=4096 --segments=4

For each supported kernel, with and without a window and a soft cap, prints the
relative error (by norm) of values and gradients in packed rows against the
float32 reference, and the milliseconds of a forward pass and of a forward and
backward pass. Exits with code 70 if an error exceeds rounding.
"""

from collections.abc import Callable
import itertools
import time
from typing import Any, get_args

from absl import flags
import jax
import jax.numpy as jnp

from atlas_jax import errors
from atlas_jax.models import kernel_check, kernels
from scripts import program

_LENGTH = flags.DEFINE_integer("length", 2048, "Tokens of a row.")
_ROWS = flags.DEFINE_integer("rows", 2, "Rows in a batch.")
_SEGMENTS = flags.DEFINE_integer("segments", 4, "Sequences in a row.")
_HEADS = flags.DEFINE_integer("heads", 8, "Query heads.")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 2, "Key and value heads.")
_WIDTH = flags.DEFINE_integer("head_width", 128, "Width of each head.")
_WINDOW = flags.DEFINE_integer("window", 512, "Tokens of the sliding window.")
_SOFT_CAP = flags.DEFINE_float("soft_cap", 50.0, "Soft cap of the scores.")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of queries, keys, values.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Runs; the fastest counts.")


def main() -> errors.Exit:
  """Prints a line per kernel and mask; returns INTERNAL if one is off."""
  print(
    f"{jax.devices()[0].device_kind}, {_DTYPE.value}, {_ROWS.value} rows of"
  )
  print(f"{_LENGTH.value} tokens in {_SEGMENTS.value} segments")
  names = ("kernel", "window", "cap", "value", "grad q", "grad k", "grad v")
  print(*(f"{name:>9}" for name in (*names, "fwd ms", "both ms")))
  is_off = False
  for window, soft_cap, kernel in itertools.product(
    (None, _WINDOW.value), (None, _SOFT_CAP.value), get_args(kernels.Kernel)
  ):
    cells = (f"{x!s:>9}" for x in (kernel, window, soft_cap))
    try:
      kernels.choose(
        kernel,
        platform=jax.default_backend(),
        head_width=_WIDTH.value,
        dtype=jnp.dtype(_DTYPE.value),
        soft_cap=soft_cap,
      )
    except errors.ConfigError as error:
      print(*cells, f"unsupported: {error.why}")
      continue
    case = _case(kernels.Mask(window, _WIDTH.value**-0.5, soft_cap))
    found = kernel_check.differences(kernel, case)
    times = (f"{1e3 * x:9.2f}" for x in _times(kernel, case))
    print(*cells, *(f"{x:9.5f}" for x in found), *times)
    is_off |= not max(found) < kernel_check.TOLERANCE
  return errors.Exit.INTERNAL if is_off else errors.Exit.DONE


def _case(mask: kernels.Mask) -> kernel_check.Case:
  """Fills 7/8 of each row with segments of alternating sizes n, 2n, n, ..."""
  pairs = -(-_SEGMENTS.value // 2)
  small = _LENGTH.value * 7 // 8 // (3 * pairs)
  sizes = ((small, 2 * small) * pairs)[: _SEGMENTS.value]
  return kernel_check.Case(
    mask,
    _HEADS.value,
    _KV_HEADS.value,
    _WIDTH.value,
    jnp.dtype(_DTYPE.value),
    lengths=(sizes,) * _ROWS.value,
    num_tokens=_LENGTH.value,
  )


def _times(
  kernel: kernels.Kernel, case: kernel_check.Case
) -> tuple[float, float]:
  """Returns seconds of a forward pass, and of a forward and backward pass."""
  tokens, arrays = kernel_check.draw(case)

  @jax.jit
  def forward(tokens: kernels.Tokens, arrays: list[jax.Array]) -> jax.Array:
    return kernels.make(kernel, case.mask, tokens, tokens)(*arrays[:3])

  @jax.jit
  def both(tokens: kernels.Tokens, arrays: list[jax.Array]) -> Any:
    return kernel_check.attend(kernel, case, tokens, arrays)

  return _fastest(forward, tokens, arrays), _fastest(both, tokens, arrays)


def _fastest(run: Callable[..., Any], *args: Any) -> float:
  """Returns the seconds of the fastest run, after one run that compiles."""
  jax.block_until_ready(run(*args))
  seconds = []
  for _ in range(_REPEATS.value):
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    seconds.append(time.perf_counter() - start)
  return min(seconds)


if __name__ == "__main__":
  program.run(main)
