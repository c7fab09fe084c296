# SPDX-License-Identifier: Apache-2.0
"""GRPO of a teacher, with a reward measured on its student.

  python -m scripts.train_grpo --config=configs/run/teacher_rcl.py \
    --workdir=results/rcl --config.model.path=results/sft/export \
    --config.data.path=questions.jsonl

Sized for 8 GPUs with 80 GB; not run on them yet. `:smoke` runs on a CPU,
`:dapo` or another name in configs/loss selects the loss, `:smoke,dapo` both.
"""

import ml_collections

from configs import lora, mesh, optimizer, rollout, sections
from configs.data import prompts, selection, world
from configs.loss import cispo, dapo, dr_grpo, grpo, gspo, rcl, rloo
from configs.model import frozen, hf, tiny
from configs.reward import teaching

_LOSSES = dict(
  rcl=rcl,
  grpo=grpo,
  dr_grpo=dr_grpo,
  dapo=dapo,
  gspo=gspo,
  cispo=cispo,
  rloo=rloo,
)


def get_config(  # noqa: PLR0915 - one statement per section.
  variant: str = "full",
) -> ml_collections.ConfigDict:
  is_smoke, loss = _parse(variant)
  config = ml_collections.ConfigDict()
  config.recipe = "grpo"
  config.seed = 42
  config.dry_pass = True  # Whether to show one question before step 1.
  config.world = sections.get_world()
  # The lengths of `get_sampling` are for models that do not think first.
  config.model = hf.get_config(
    "Arc-Intelligence/ATLAS-8B-Instruct", hf.NO_THINKING
  )
  config.student = frozen.get_config("Qwen/Qwen3-4B", hf.NO_THINKING)
  config.lora = lora.get_config()
  config.mesh = mesh.get_config()
  config.data = selection.get_config()
  config.held_out = dict(path="", fraction=0.0)  # data.sets.HeldOut
  config.sampler = dict(max_rows=256)  # rollout.sampler.open_sampler
  config.rollout = rollout.get_config()
  config.roles = sections.get_roles()
  config.templates = prompts.get_templates()
  config.sampling = get_sampling()
  config.reward = teaching.get_config()
  config.correction = dict(  # losses.correction.sampler_weights
    level="token", outside="truncate", min_ratio=0.0, max_ratio=2.0
  )
  # Mean error factor of token probabilities between trainer and sampler.
  config.agreement = dict(  # guards.agreement
    max_prob_error=1.02, every_steps=1
  )
  config.alarm = dict(  # guards.alarm
    max_ratio=100.0, max_kl=10.0, stop=False, min_used_fraction=0.1
  )
  config.overlap = dict(max_staleness=0)  # train.grpo_batches.RolloutBatches
  config.logits = dict(chunk_tokens=512)  # train.score.token_stats
  config.experts = dict(router_aux_coef=0.0)  # train.score.add_balance
  config.reference = dict(sync_every=64, mix=0.6, dtype="")
  config.offload = dict(  # train.train_state.Offload
    optimizer=False, reference=False
  )
  config.batch = dict(
    num_questions=4,
    num_iterations=1,
    num_minibatches=1,
    per_device=1,
    mask_truncated=True,
  )
  config.packing = dict(  # train.rollout_packing.lay_out
    length=4096, packed=True
  )
  # The sections loss, advantages and groups define GRPO, DAPO, RLOO, ...
  config.update(_LOSSES[loss].get_config())
  config.schedule = dict(  # train.schedule.make
    learning_rate=1e-6,
    schedule="constant",
    warmup_fraction=0.03,
    warmup_steps=0,
    decay_fraction=0.0,
  )
  config.optimizer = optimizer.get_config()
  config.loop = sections.get_loop()
  config.loop.update(num_steps=250, eval_every=10, save_every=10)
  config.evaluation = dict(  # Of held-out questions, every `loop.eval_every`.
    num_questions=64,
    num_bootstrap=1000,
    num_baselines=4,  # Per question; sampled once.
    num_teachings=1,  # Per question.
    num_answers=1,  # Per teaching.
  )
  config.report = sections.get_report()
  config.samples = dict(  # telemetry.samples.SampleLog
    log_completions_every=10,
    num_completions=8,
    stored_fraction=0.1,
    successful_reward=1.0,
  )
  config.checkpoint = sections.get_checkpoint()
  config.checkpoint.update(best_metric="", best_mode="max")
  config.export = sections.get_export()

  if is_smoke:
    _make_smoke(config)
  return config


def _parse(variant: str) -> tuple[bool, str]:
  """Returns whether a variant is a smoke run, and the name of its loss."""
  size, _, loss = variant.rpartition(",")
  if variant in ("full", "smoke"):
    size, loss = variant, "rcl"
  if size not in ("", "full", "smoke") or loss not in _LOSSES:
    raise ValueError(
      f"Unknown variant {variant!r}; there is :smoke, any of "
      f"{', '.join(_LOSSES)}, and both as in :smoke,dapo."
    )
  return size == "smoke", loss


def _make_smoke(config: ml_collections.ConfigDict) -> None:
  config.world = dict(directory=world.DIRECTORY, with_teacher=True)
  config.dry_pass = False  # Compiles programs for a single question.
  config.model = tiny.get_config(world.TEACHER)
  config.student = tiny.get_config(world.STUDENT)
  config.data.path = f"{world.DIRECTORY}/questions.jsonl"
  config.templates = world.get_templates()
  config.sampling = get_world_sampling()
  config.rollout.dtype = "float32"
  config.logits.chunk_tokens = 128
  config.agreement.max_prob_error = 1.0005  # In float32.
  # If all teachings do equally well, scaling would only reward brevity.
  config.advantages.update(scale="none", min_std=0.0)
  config.batch.num_questions = 16
  # The 128 samples of a step fit into one microbatch.
  config.batch.per_device = 48
  config.packing = dict(length=192, packed=True)
  config.sampler.max_rows = 128
  config.sampling.teach.group_size = 8
  config.schedule.learning_rate = 3e-4
  config.optimizer.adamw.beta2 = 0.99
  config.loop.num_steps = 60
  config.loop.log_every = 5
  config.loop.eval_every = 20
  config.loop.save_every = 20
  config.held_out.path = f"{world.DIRECTORY}/validation.jsonl"
  config.export.dtype = "float32"


def get_sampling() -> ml_collections.ConfigDict:
  """Returns `types.SamplingParams` without seed for every protocol call."""
  common = dict(temperature=0.7, top_p=1.0, top_k=0)
  return ml_collections.ConfigDict(
    dict(
      probe=dict(group_size=1, max_completion_tokens=50, **common),
      baseline=dict(group_size=4, max_completion_tokens=4096, **common),
      teach=dict(group_size=32, max_completion_tokens=1024, **common),
      solve=dict(group_size=1, max_completion_tokens=4096, **common),
    )
  )


def get_world_sampling() -> ml_collections.ConfigDict:
  """Returns `get_sampling` with the short lengths of the small world."""
  sampling = get_sampling()
  # Only the teacher needs to explore.
  sampling.teach.temperature = 1.0
  sampling.probe.max_completion_tokens = 16
  sampling.baseline.max_completion_tokens = 40
  sampling.teach.max_completion_tokens = 64
  sampling.solve.max_completion_tokens = 40
  return sampling
