# SPDX-License-Identifier: Apache-2.0
"""Times an update against PyTorch's, on the same device in one run.

  JAX_PLATFORMS=cpu python -m scripts.bench.train --shapes=tiny --lengths=96 \
    --batch=64 --dtype=float32 --remat=dots --rounds=8

Both train a Qwen3 with random float32 parameters and AdamW on the same tokens:
ours with the steps of the recipes, PyTorch with transformers and sdpa, its
fastest attention. `sft` is the cross entropy, `grpo` an update on the
completions of one batch, an even number. Layouts are `full` rows, or sequences
of a quarter of a row on average, `packed` into rows or `padded` to rows;
PyTorch always pads.

A case is two processes, one per side, which alternate in turns of `--steps`
steps, or run one after the other if both do not fit (`--notogether`). The first
turn compiles programs and does not count. The last line is `ratio: N`,
PyTorch's time over ours, the geometric mean over cases. `--sides=ours` does not
require PyTorch. docs/benchmarks/train.md has the commands for a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import itertools
import json
import subprocess
import sys
import time
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from atlas_jax import sharding, types
from atlas_jax.data import packing
from atlas_jax.models import decoder, decoder_config
from atlas_jax.train import (
  grpo_update,
  optimizer_step,
  sft,
  train_state,
  trainable,
)
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train.telemetry import flops
from configs.run import rlvr
from scripts import program
from scripts.bench import memory, timing

_FIELDS = (
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "head_dim",
  "vocab_size",
)
_SHAPES = {
  "tiny": (128, 256, 4, 4, 2, 32, 512),
  "small": (512, 1536, 4, 8, 4, 64, 4096),
  "0.6b": (1024, 3072, 28, 16, 8, 128, 151936),
  "1.7b": (2048, 6144, 28, 16, 8, 128, 151936),
  "4b": (2560, 9728, 36, 32, 8, 128, 151936),
}
_WHAT = flags.DEFINE_list("what", ["sft"], "From sft, grpo.")
_SHAPE = flags.DEFINE_list("shapes", ["tiny"], f"From {', '.join(_SHAPES)}.")
_LENGTH = flags.DEFINE_list("lengths", ["1024"], "Tokens in a row.")
_LAYOUT = flags.DEFINE_list("layouts", ["full"], "From full, packed, padded.")
_CASES = (_WHAT, _SHAPE, _LENGTH, _LAYOUT)
_BATCH = flags.DEFINE_integer("batch", 8, "Size of a batch, in full rows.")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Precision of activations.")
_ATTENTION = flags.DEFINE_string("attention", "auto", "Our attention kernel.")
_REMAT = flags.DEFINE_string("remat", "block", "Our remat; see docs/speed.md.")
_UNROLL = flags.DEFINE_integer("unroll", 1, "Layers in a scan iteration.")
_CHUNK = flags.DEFINE_integer("chunk", 512, "Tokens whose logits exist at once")
_CHECKPOINTS = flags.DEFINE_bool("torch_checkpoints", False, "Torch's remat.")
_COMPILE = flags.DEFINE_bool("torch_compile", False, "Use torch.compile.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each side that count.")
_STEPS = flags.DEFINE_integer("steps", 3, "Steps in a turn.")
_TOGETHER = flags.DEFINE_bool("together", True, "Whether turns alternate.")
_SIDES = flags.DEFINE_list("sides", ["ours", "torch"], "Sides to run.")
_SIDE = flags.DEFINE_string("side", "", "Set by the parent.")
_SHARED = (
  _BATCH,
  _DTYPE,
  _ATTENTION,
  _REMAT,
  _UNROLL,
  _CHUNK,
  _CHECKPOINTS,
  _COMPILE,
  _STEPS,
)

_RATE = 1e-5
_Turn = dict[str, Any]  # Any: JSON.
_Sequences = Sequence[np.ndarray]
# Any: the metrics of either recipe.
_Update = Callable[[train_state.TrainState], tuple[train_state.TrainState, Any]]


class Side(NamedTuple):
  """A training step of one side, and how to measure it."""

  step: Callable[[], None]
  peak_bytes: Callable[[], int]
  device_kind: str


def main() -> None:
  """Runs one side of a case, or starts all cases and prints the table."""
  if _SIDE.value:
    what, shape, length, layout = (flag.value[0] for flag in _CASES)
    sequences = _sequences(int(length), layout, shape)
    if _SIDE.value == "ours":
      side = _ours(what, shape, int(length), layout, sequences)
    else:
      from scripts.bench import train_torch  # Our side works without PyTorch.

      side = train_torch.make(
        what,
        _config(shape),
        sequences,
        dtype=_DTYPE.value,
        rate=_RATE,
        is_compiled=_COMPILE.value,
        has_checkpoints=_CHECKPOINTS.value,
      )
    _serve(Side(*side), sequences, shape)
    return
  ratios = []
  print(
    f"{'case':>26} {'side':>6} {'step s':>8} {'CPU s':>8} {'tokens/s':>9}"
    f" {'TFLOP/s':>8} {'MFU':>6} {'GiB':>6}"
  )
  for case in itertools.product(*(flag.value for flag in _CASES)):
    results = _run(case)
    for name, result in results.items():
      print(_line(case, name, result), flush=True)
    if len(results) > 1:
      _ratio(results, "cpu")
      ratios.append(_ratio(results, "seconds"))
  if ratios:
    print(f"ratio: {np.exp(np.mean(np.log(ratios))):.2f}")


def _config(shape: str) -> dict[str, Any]:  # Any: JSON.
  """Returns the config.json of both sides."""
  return {
    "model_type": "qwen3",
    **dict(zip(_FIELDS, _SHAPES[shape], strict=True)),
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
  }


def _sequences(length: int, layout: str, shape: str) -> list[np.ndarray]:
  """Draws the token ids of both sides, `--batch` x `length` in each layout."""
  rng = np.random.default_rng(0)
  lengths, left = [], _BATCH.value * length
  while left:
    size = length
    if layout != "full":
      size = int(np.clip(rng.exponential(length / 4), 8, length))
    lengths.append(min(size, left))
    left -= lengths[-1]
  if layout != "full" and len(lengths) % 2:  # GRPO groups are pairs.
    first = lengths.pop(0)
    lengths += [first // 2, first - first // 2]
  return [rng.integers(1, _SHAPES[shape][-1], size) for size in lengths]


def _ours(
  what: str, shape: str, length: int, layout: str, sequences: _Sequences
) -> Side:
  """Creates our side."""
  # Any: `build` validates them.
  attention: Any = _ATTENTION.value
  remat: Any = _REMAT.value
  model = decoder.build(
    decoder_config.from_hf(_config(shape)),
    dtype=_DTYPE.value,
    attention=attention,
    remat=remat,
    unroll=_UNROLL.value,
  )
  mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
  placed = sharding.of_params(mesh, model.abstract_params)
  params = jax.jit(model.init, out_shardings=placed)(jax.random.key(0))
  config: types.Config = rlvr.get_config("smoke,grpo")
  config.logits.chunk_tokens = _CHUNK.value
  config.loss.kl_coef = 0.0
  config.sampling.teach.group_size = 2
  config.sampling.teach.max_completion_tokens = length
  config.packing = dict(length=length, packed=layout == "packed")
  optimizer = train_optimizer.make_optimizer(
    lambda _: jnp.float32(_RATE), **config.optimizer
  )
  state = train_state.create(params, optimizer, mesh=mesh)
  shardings = train_state.shardings(state)
  if what == "sft":
    rows = packing.pad if layout == "padded" else packing.pack
    examples = [(ids, np.ones(len(ids), bool)) for ids in sequences]
    arrays = rows(examples, length, too_long="error").arrays
    batch = jax.device_put(arrays, sharding.of_batch(mesh))
    update = _sft_update(model, optimizer, shardings, batch)
  else:
    updater = grpo_update.GrpoUpdate(
      trainable.full_policy(model),
      optimizer,
      shardings=shardings,
      mesh=mesh,
      config=config,
    )
    update = _grpo_update(updater, sequences)

  def one_step() -> None:
    nonlocal state
    state, metrics = update(state)
    jax.block_until_ready((state, metrics))

  device = jax.devices()[0]

  def peak_bytes() -> int:
    if stats := device.memory_stats():
      return stats["peak_bytes_in_use"]
    return memory.peak_bytes()

  return Side(one_step, peak_bytes, device.device_kind)


def _sft_update(
  model: decoder.Model,
  optimizer: optax.GradientTransformation,
  shardings: train_state.TrainState,
  batch: optimizer_step.Batch,
) -> _Update:
  """Creates an SFT update on one batch."""
  step = optimizer_step.make_step(
    functools.partial(
      sft.packed_loss,
      model,
      z_loss_coef=0.0,
      chunk_tokens=_CHUNK.value,
      router_aux_coef=0.0,
    ),
    optimizer,
    frozen={},
    shardings=shardings,
  )
  return lambda state: step(state, batch)


def _grpo_update(
  updater: grpo_update.GrpoUpdate, sequences: _Sequences
) -> _Update:
  """Creates a GRPO update on completions with rewards 0 and 1 in turn."""
  records = [*map(_record, sequences)]
  rewards = [types.Reward(float(i % 2)) for i, _ in enumerate(records)]
  return lambda state: updater.update(
    state, records, rewards, is_compared=False
  )


def _record(ids: np.ndarray) -> types.TeachingRecord:
  """Creates a record whose completion is the last 3/4 of the tokens."""
  tokens, start = tuple(ids.tolist()), len(ids) // 4
  logprobs = (-1.0,) * (len(ids) - start)
  rollout = types.Rollout(
    types.Prompt("", "", tokens[:start]),
    types.Completion(tokens[start:], logprobs, logprobs, "stop", version=0),
  )
  return types.TeachingRecord(
    types.Question("", "", ""), "", rollout, None, 0, (), ()
  )


def _serve(side: Side, sequences: _Sequences, shape: str) -> None:
  """Runs a turn for each line on stdin, and prints its measurements."""
  config = decoder_config.from_hf(_config(shape))
  lengths = [len(ids) for ids in sequences]
  for _ in sys.stdin:
    seconds, cpu = [], []
    for _ in range(_STEPS.value):
      start, cpu_start = time.perf_counter(), time.process_time()
      side.step()
      seconds.append(time.perf_counter() - start)
      cpu.append(time.process_time() - cpu_start)
    turn = {
      "seconds": seconds,
      "cpu": cpu,
      "bytes": side.peak_bytes(),
      "tokens": sum(lengths),
      "flops": flops.of_update(config, lengths, is_base_frozen=False),
      "device": side.device_kind,
    }
    print(json.dumps(turn), flush=True)


@contextlib.contextmanager
def _open(name: str, case: Sequence[str]) -> Iterator[Callable[[], _Turn]]:
  """Starts the process of a side; yields a function that runs a turn."""
  process = subprocess.Popen(
    (
      sys.executable,
      "-m",
      "scripts.bench.train",
      f"--side={name}",
      *(f"--{f.name}={v}" for f, v in zip(_CASES, case, strict=True)),
      *(f"--{flag.name}={flag.value}" for flag in _SHARED),
    ),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )

  def turn() -> _Turn:
    print("go", file=process.stdin, flush=True)
    for line in process.stdout or ():
      if line.startswith('{"seconds"'):
        return json.loads(line)
    raise RuntimeError(f"{name} exited with code {process.wait()}.")

  try:
    yield turn
  finally:
    process.terminate()
    process.wait()


def _run(case: Sequence[str]) -> dict[str, list[_Turn]]:
  """Runs the turns of all sides; returns those that count, by side."""
  results: dict[str, list[_Turn]] = {n: [] for n in _SIDES.value}
  groups = [_SIDES.value] if _TOGETHER.value else [[n] for n in _SIDES.value]
  for names in groups:
    with contextlib.ExitStack() as stack:
      sides = {n: stack.enter_context(_open(n, case)) for n in names}
      for turn in sides.values():
        turn()
      for _ in range(_ROUNDS.value):
        for name, turn in sides.items():
          results[name].append(turn())
  return results


def _values(turns: Sequence[_Turn], name: str) -> np.ndarray:
  return np.array([value for turn in turns for value in turn[name]])


def _line(case: Sequence[str], name: str, turns: Sequence[_Turn]) -> str:
  """Formats the medians of one side."""
  last = turns[-1]
  step, cpu = (np.median(_values(turns, key)) for key in ("seconds", "cpu"))
  peak = flops.peak(last["device"])
  mfu = f"{last['flops'] / step / peak:6.1%}" if peak else f"{'?':>6}"
  return (
    f"{' '.join(case):>26} {name:>6} {step:8.4f} {cpu:8.4f} "
    f"{last['tokens'] / step:9.0f} {last['flops'] / step / 1e12:8.3f} {mfu} "
    f"{last['bytes'] / 2**30:6.1f}"
  )


def _ratio(results: dict[str, list[_Turn]], key: str) -> float:
  """Prints PyTorch's median over ours, with its 95% bootstrap interval."""
  ours, other = (_values(results[name], key) for name in ("ours", "torch"))
  low, high = timing.ratio_interval(other, ours)
  ratio = float(np.median(other) / np.median(ours))
  print(f"  torch/ours, {key}: {ratio:.2f} [{low:.2f}, {high:.2f}]", flush=True)
  return ratio


if __name__ == "__main__":
  program.run(main)
