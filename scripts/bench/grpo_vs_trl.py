# SPDX-License-Identifier: Apache-2.0
"""Times a GRPO step against one of TRL's, alternating on one machine.

  python -m scripts.bench.grpo_vs_trl --rounds=6

Both train the same small random model from the same directory on the same
prompts, with the same group size, lengths, temperature, optimizer and reward,
and both sample in the training process: TRL with transformers' `generate`. Each
side is a process; they alternate in turns of `--steps` steps. The first turn
compiles programs and does not count. Batch and lengths are TRL's defaults:
eight completions of at most 256 tokens. The last line is `ratio: N`, TRL's time
over ours. Requires requirements/parity.txt.
"""

from collections.abc import Iterator, Sequence
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags
import numpy as np

from atlas_jax import chat, sharding, types
from atlas_jax.data import sets
from atlas_jax.rewards import grading
from atlas_jax.train import grpo, loop
from configs.run import rlvr
from scripts import program, small_world
from scripts.bench import memory, timing
from scripts.job import components

_ROUNDS = flags.DEFINE_integer("rounds", 6, "Turns of each side that count.")
_STEPS = flags.DEFINE_integer("steps", 3, "Steps in a turn.")
_QUESTIONS = flags.DEFINE_integer("questions", 1, "Prompts in a step.")
_GROUP = flags.DEFINE_integer("group_size", 8, "Completions of a prompt.")
_TOKENS = flags.DEFINE_integer(
  "tokens", 256, "Limit on tokens of a completion."
)
_LAYERS = flags.DEFINE_integer("layers", 4, "Layers of the model.")
_WIDTH = flags.DEFINE_integer("width", 64, "Width of the model.")
_SIDE = flags.DEFINE_enum("side", None, ["ours", "trl"], "Set by the parent.")
_DIRECTORY = flags.DEFINE_string("directory", "", "Set by the parent.")

_TEMPLATE = "{question}"
_LEARNING_RATE = 1e-4
_MAX_GRAD_NORM = 1.0


def main() -> None:
  """Runs one side, or starts both and prints the table."""
  if _SIDE.value == "ours":
    _ours(pathlib.Path(_DIRECTORY.value))
  elif _SIDE.value == "trl":
    _trl(pathlib.Path(_DIRECTORY.value))
  else:
    with tempfile.TemporaryDirectory() as directory:
      _make(pathlib.Path(directory))
      with _Side("ours", directory) as ours, _Side("trl", directory) as trl:
        for side in (ours, trl):
          side.turn()
          side.steps.clear()
        for _ in range(_ROUNDS.value):
          ours.turn()
          trl.turn()
        _report(ours, trl)


def _make(directory: pathlib.Path) -> None:
  """Writes the model and the prompts of both sides."""
  texts = small_world.write_data(directory, 0)
  tokenizer = small_world.make_tokenizer(texts)
  small_world.write_model(
    directory / "model",
    tokenizer,
    "qwen3",
    num_layers=_LAYERS.value,
    width=_WIDTH.value,
    seed=0,
  )


def _reward(text: str) -> float:
  """Returns the fraction of digits, a reward that both sides can increase."""
  return sum(letter.isdigit() for letter in text) / max(1, len(text))


class _Side:
  """The process of one side, which runs a turn on request."""

  def __init__(self, name: str, directory: str) -> None:
    self.name, self.steps = name, list[dict[str, float]]()
    self._process = subprocess.Popen(
      (
        sys.executable,
        "-m",
        "scripts.bench.grpo_vs_trl",
        f"--side={name}",
        f"--directory={directory}",
        *(f"--{flag.name}={flag.value}" for flag in _SHARED),
      ),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def __enter__(self) -> "_Side":
    return self

  def __exit__(self, *error: object) -> None:
    self._process.terminate()
    self._process.send_signal(signal.SIGCONT)
    self._process.wait()

  def turn(self) -> None:
    """Runs `--steps` steps; the process is suspended between turns.

    Otherwise its spinning threads would take CPU time from the other side.
    """
    process = self._process
    process.send_signal(signal.SIGCONT)
    for _ in range(_STEPS.value):
      print("go", file=process.stdin, flush=True)
      for line in process.stdout or ():
        if line.startswith('{"step"'):
          self.steps.append(json.loads(line))
          break
      else:
        raise RuntimeError(f"{self.name} exited with code {process.wait()}.")
    process.send_signal(signal.SIGSTOP)


_SHARED = (_ROUNDS, _STEPS, _QUESTIONS, _GROUP, _TOKENS, _LAYERS, _WIDTH)


def _num_steps() -> int:
  return (1 + _ROUNDS.value) * _STEPS.value + 1


def _config(
  directory: pathlib.Path,
) -> types.Config:
  """Returns the config of our side, for one CPU device."""
  config: Any = rlvr.get_config("smoke,grpo")
  config.model.path = str(directory / "model")
  config.template = _TEMPLATE
  config.mesh.update(data=1, fsdp=1, tensor=1)
  config.sampler.max_rows = _QUESTIONS.value * _GROUP.value
  config.sampling.teach.group_size = _GROUP.value
  config.sampling.teach.max_completion_tokens = _TOKENS.value
  config.loss.kl_coef = 0.0
  config.advantages.scale = "group"
  config.batch.num_questions = _QUESTIONS.value
  config.batch.mask_truncated = False
  config.logits.chunk_tokens = 512
  config.schedule.learning_rate = _LEARNING_RATE
  config.optimizer.max_grad_norm = _MAX_GRAD_NORM
  config.optimizer.adamw.beta2 = 0.999
  config.loop.num_steps = _num_steps()
  config.loop.log_every = 1
  config.loop.save_every = config.loop.num_steps
  return config


def _ours(directory: pathlib.Path) -> None:
  """Trains with `train.grpo`."""
  config = _config(directory)
  clock = _Clock()

  def reward_fn(
    records: Sequence[types.TeachingRecord],
  ) -> list[types.Reward]:
    clock.num_tokens = sum(r.taught[0].num_tokens for r in records)
    return [types.Reward(_reward(r.taught[0].text)) for r in records]

  def after_step() -> bool:
    clock.end_step()
    return False

  mesh = sharding.make_mesh(**config.mesh)
  policy = components.open_model(mesh, **config.model)
  workdir = directory / "ours"
  workdir.mkdir()
  questions, _ = sets.questions(
    _selection(directory),
    sets.HeldOut(path="", fraction=0.0),
    batch_size=config.batch.num_questions,
    seed=config.seed,
    workdir=workdir,
  )
  with components.open_single_model(policy, mesh, config) as rollouts:
    run = rollouts.run

    def timed(*args: Any, **kwargs: Any) -> list[types.TeachingRecord]:
      with clock.generate():
        return run(*args, **kwargs)

    rollouts.run = timed
    clock.wait()
    grpo.train(
      *components.open_policy(policy, mesh, seed=config.seed, **config.lora),
      protocol=rollouts,
      grader=grading.by_rules(),
      reward_fn=reward_fn,
      questions=questions,
      held_out=(),
      evaluation=rollouts,
      mesh=mesh,
      config=config,
      run=loop.Run(
        workdir,
        components.open_writer(workdir, config),
        should_stop=after_step,
      ),
    )


class _Clock:
  """Times a step between two requests of the parent process."""

  def __init__(self) -> None:
    self.num_tokens, self._generate, self._start = 0, 0.0, 0.0

  def wait(self) -> None:
    """Waits for the request to run a step."""
    sys.stdin.readline()
    self._generate, self._start = 0.0, time.perf_counter()

  @contextlib.contextmanager
  def generate(self) -> Iterator[None]:
    """Counts the time within as generation."""
    start = time.perf_counter()
    yield
    self._generate += time.perf_counter() - start

  def end_step(self) -> None:
    """Prints the times of a step, and waits for the next request."""
    step = {
      "step": time.perf_counter() - self._start,
      "generate": self._generate,
      "peak": memory.peak_bytes(),
      "tokens": self.num_tokens,
    }
    print(json.dumps(step), flush=True)
    self.wait()


def _selection(directory: pathlib.Path) -> sets.Selection:
  path = str(directory / "questions.jsonl")
  return sets.Selection(
    path, "default", formats={}, weights=(), max_rows=0, max_bad_rows=0
  )


def _trl(directory: pathlib.Path) -> None:
  """Trains with TRL's GRPOTrainer, which samples with `generate`."""
  import datasets  # Imported only in this process: slow, and imports torch.
  import transformers
  from trl.trainer import grpo_config, grpo_trainer

  clock = _Clock()

  class Timed(grpo_trainer.GRPOTrainer):
    def _generate(self, prompts: list[str]) -> types.Config:
      with clock.generate():
        return super()._generate(prompts)

  class Gate(transformers.TrainerCallback):
    def on_train_begin(self, *_: Any, **__: Any) -> None:
      clock.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
      clock.end_step()

  def reward_fn(
    completions: list[str], completion_ids: list[list[int]], **_: Any
  ) -> list[float | None]:
    clock.num_tokens = sum(map(len, completion_ids))
    return [_reward(text) for text in completions]

  tokenizer = chat.load_tokenizer(directory / "model")
  prompts = [
    chat.render(tokenizer, [types.Message("user", q.question)])[0]
    for q in sets.all_questions(_selection(directory), workdir=directory)
  ]
  trainer = Timed(
    model=str(directory / "model"),
    reward_funcs=[reward_fn],
    args=grpo_config.GRPOConfig(
      output_dir=str(directory / "trl"),
      use_cpu=True,
      bf16=False,
      report_to="none",
      save_strategy="no",
      logging_steps=1,
      disable_tqdm=True,
      gradient_checkpointing=False,
      max_steps=_num_steps(),
      per_device_train_batch_size=_QUESTIONS.value * _GROUP.value,
      num_generations=_GROUP.value,
      max_completion_length=_TOKENS.value,
      temperature=1.0,
      beta=0.0,
      loss_type="grpo",
      learning_rate=_LEARNING_RATE,
      lr_scheduler_type="constant",
      max_grad_norm=_MAX_GRAD_NORM,
    ),
    train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
    processing_class=tokenizer,
    callbacks=[Gate()],
  )
  trainer.train()


def _report(ours: _Side, trl: _Side) -> None:
  """Prints the table; the last line is the ratio of the medians."""
  print(
    f"{_QUESTIONS.value} prompts x {_GROUP.value} completions of at most "
    f"{_TOKENS.value} tokens, {_LAYERS.value} layers {_WIDTH.value} wide, "
    f"float32; {os.cpu_count()} cores; {len(ours.steps)} alternating steps each"
  )
  print(f"{'':>10} {'ours':>10} {'TRL':>10} {'TRL/ours':>10}")
  for name in ("step", "generate", "rest"):
    values = [np.median(_values(side, name)) for side in (ours, trl)]
    ratio = values[1] / values[0]
    print(f"{name:>8} s {values[0]:10.3f} {values[1]:10.3f} {ratio:10.2f}")
  peaks = [max(_values(side, "peak")) / 2**20 for side in (ours, trl)]
  print(f"{'peak MiB':>10} {peaks[0]:10.0f} {peaks[1]:10.0f}")
  tokens = [np.mean(_values(side, "tokens")) for side in (ours, trl)]
  print(f"{'tokens':>10} {tokens[0]:10.0f} {tokens[1]:10.0f}")
  steps = [_values(side, "step") for side in (trl, ours)]
  low, high = timing.ratio_interval(*steps)
  print(f"95% bootstrap interval of the ratio: [{low:.2f}, {high:.2f}]")
  print(f"ratio: {np.median(steps[0]) / np.median(steps[1]):.2f}")


def _values(side: _Side, name: str) -> np.ndarray:
  if name == "rest":
    return _values(side, "step") - _values(side, "generate")
  return np.array([step[name] for step in side.steps])


if __name__ == "__main__":
  program.run(main)
