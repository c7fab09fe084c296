# SPDX-License-Identifier: Apache-2.0
"""Times the compilation of a training step for growing numbers of layers.

  JAX_PLATFORMS=cpu python -m scripts.bench.compile --layers=4,8,16,32,64

The last line, `ratio: N`, is the CPU seconds of the last number of layers over
those of the first. It stays near 1, since the layers are one scan. CPU seconds
vary less than wall-clock time when the machine is shared.
"""

import functools
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp

from atlas_jax import sharding, types
from atlas_jax.models import decoder, decoder_config
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train import optimizer_step, sft, train_state
from configs import optimizer
from scripts import program

_LAYERS = flags.DEFINE_list(
  "layers", ["4", "8", "16", "32", "64"], "Numbers of layers to time."
)
_UNROLL = flags.DEFINE_integer("unroll", 1, "Layers in a scan iteration.")
_REMAT = flags.DEFINE_string("remat", "block", "See docs/speed.md.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Runs; the fastest counts.")

_BATCH, _LENGTH = 8, 128


def main() -> None:
  """Prints a line per number of layers, and the ratio."""
  # A cached program would not be compiled.
  jax.config.update("jax_enable_compilation_cache", False)
  device = jax.devices()[0].device_kind
  print(f"{device}, remat {_REMAT.value}, unroll {_UNROLL.value}")
  print(f"{'layers':>8} {'trace s':>8} {'compile s':>10} {'CPU s':>8}")
  best = []
  for num_layers in map(int, _LAYERS.value):
    times = [_time(num_layers) for _ in range(_REPEATS.value)]
    trace, compile_s, cpu = (min(column) for column in zip(*times, strict=True))
    print(f"{num_layers:8} {trace:8.2f} {compile_s:10.2f} {cpu:8.2f}")
    best.append(cpu)
  print(f"ratio: {best[-1] / best[0]:.2f}")


def _time(num_layers: int) -> tuple[float, float, float]:
  """Returns seconds of tracing and of compiling, and CPU seconds of both."""
  lower = _make_lower(num_layers)
  jax.clear_caches()
  start, cpu_start = time.perf_counter(), time.process_time()
  lowered = lower()
  traced = time.perf_counter()
  lowered.compile()
  end, cpu_end = time.perf_counter(), time.process_time()
  return traced - start, end - traced, cpu_end - cpu_start


def _make_lower(num_layers: int) -> types.Config:
  """Returns a function that traces the training step of a small Qwen3."""
  config = decoder_config.from_hf(
    {
      "model_type": "qwen3",
      "vocab_size": 512,
      "hidden_size": 64,
      "intermediate_size": 128,
      "num_hidden_layers": num_layers,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "head_dim": 16,
      "max_position_embeddings": _LENGTH,
      "rms_norm_eps": 1e-6,
    }
  )
  remat: Any = _REMAT.value  # Any: `build` validates it.
  model = decoder.build(
    config, dtype="bfloat16", attention="xla", remat=remat, unroll=_UNROLL.value
  )
  settings: types.Config = optimizer.get_config()
  update = train_optimizer.make_optimizer(
    lambda _: jnp.float32(1e-3), **settings
  )
  mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
  params = jax.jit(
    model.init, out_shardings=sharding.of_params(mesh, model.abstract_params)
  )(jax.random.key(0))
  state = train_state.create(params, update, mesh=mesh)
  step = optimizer_step.make_step(
    functools.partial(
      sft.packed_loss,
      model,
      z_loss_coef=0.0,
      chunk_tokens=_LENGTH,
      router_aux_coef=0.0,
    ),
    update,
    frozen={},
    shardings=train_state.shardings(state),
  )
  rows = jnp.ones((_BATCH, _LENGTH), jnp.int32, device=sharding.of_batch(mesh))
  names = ("token_ids", "positions", "segment_ids")
  batch = {**dict.fromkeys(names, rows), "loss_mask": rows > 0}
  return functools.partial(jax.jit(step).lower, state, batch)


if __name__ == "__main__":
  program.run(main)
