# SPDX-License-Identifier: Apache-2.0
"""Compares the attention kernels with one another on the device at hand.

  python -m scripts.check_attention --length=4096 --segments=4

For each kernel that runs here, with and without a window and a soft cap: how
far its values and gradients in packed rows are off the reference in float32, as
a part of their norm, and the milliseconds of a pass forward and of one forward
and backward. Ends with code 70 if one is off by more than rounding.
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
_ROWS = flags.DEFINE_integer("rows", 2, "At once.")
_SEGMENTS = flags.DEFINE_integer("segments", 4, "Sequences in a row.")
_HEADS = flags.DEFINE_integer("heads", 8, "Query heads.")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 2, "Key and value heads.")
_WIDTH = flags.DEFINE_integer("head_width", 128, "Of each head.")
_WINDOW = flags.DEFINE_integer("window", 512, "Tokens seen, where not all are.")
_SOFT_CAP = flags.DEFINE_float(
  "soft_cap", 50.0, "Of scores, where there is one."
)
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of queries, keys, values.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "The least time counts.")


def main() -> errors.Exit:
  """Prints a line for each kernel and mask."""
  print(
    f"{jax.devices()[0].device_kind}, {_DTYPE.value}, {_ROWS.value} rows of"
  )
  print(f"{_LENGTH.value} tokens in {_SEGMENTS.value} segments")
  names = ("kernel", "window", "cap", "value", "grad q", "grad k", "grad v")
  print(*(f"{name:>9}" for name in (*names, "fwd ms", "both ms")))
  is_off = False
  for window, soft_cap, kernel in itertools.product(
    *((None, _WINDOW.value), (None, _SOFT_CAP.value), get_args(kernels.Kernel))
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
    except errors.ConfigError as refused:
      print(*cells, f"refused: {refused.why}")
      continue
    case = _case(kernels.Mask(window, _WIDTH.value**-0.5, soft_cap))
    found = kernel_check.differences(kernel, case)
    times = (f"{1e3 * x:9.2f}" for x in _times(kernel, case))
    print(*cells, *(f"{x:9.5f}" for x in found), *times)
    is_off |= not max(found) < kernel_check.TOLERANCE
  return errors.Exit.INTERNAL if is_off else errors.Exit.DONE


def _case(mask: kernels.Mask) -> kernel_check.Case:
  """Fills seven eighths of each row with segments of two sizes in turn."""
  pairs = -(-_SEGMENTS.value // 2)
  small = _LENGTH.value * 7 // 8 // (3 * pairs)
  sizes = ((small, 2 * small) * pairs)[: _SEGMENTS.value]
  return kernel_check.Case(
    mask,
    *(_HEADS.value, _KV_HEADS.value, _WIDTH.value, jnp.dtype(_DTYPE.value)),
    lengths=(sizes,) * _ROWS.value,
    num_tokens=_LENGTH.value,
  )


def _times(
  kernel: kernels.Kernel, case: kernel_check.Case
) -> tuple[float, float]:
  """Gives seconds forward, and forward and backward."""
  tokens, arrays = kernel_check.draw(case)

  @jax.jit
  def forward(tokens: kernels.Tokens, arrays: list[jax.Array]) -> jax.Array:
    return kernels.make(kernel, case.mask, tokens, tokens)(*arrays[:3])

  @jax.jit
  def both(tokens: kernels.Tokens, arrays: list[jax.Array]) -> Any:
    return kernel_check.attend(kernel, case, tokens, arrays)

  return _least(forward, tokens, arrays), _least(both, tokens, arrays)


def _least(run: Callable[..., Any], *args: Any) -> float:
  """Gives the least seconds of some runs, after one that compiles."""
  jax.block_until_ready(run(*args))
  seconds = []
  for _ in range(_REPEATS.value):
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    seconds.append(time.perf_counter() - start)
  return min(seconds)


if __name__ == "__main__":
  program.run(main)
