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
  config.recipe = "grpo"  # Kind of run, which one script runs; fixed.
  config.seed = 42  # Seed of all random numbers.
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
  config.held_out = sections.get_held_out()
  config.sampler = sections.get_sampler()
  config.rollout = rollout.get_config()
  config.roles = sections.get_roles()
  config.templates = prompts.get_templates()
  config.sampling = get_sampling()
  config.reward = teaching.get_config()
  config.correction = dict(  # losses.correction.sampler_weights
    level="token",  # Ratios of trainer to sampler: by token or sequence.
    outside="truncate",  # Ratios out of bounds: truncate or mask.
    min_ratio=0.0,  # Lower bound of these ratios; 0.0: none.
    max_ratio=2.0,  # Upper bound of these ratios.
  )
  config.agreement = sections.get_agreement()
  config.alarm = dict(  # train.guards.alarm.Alarm
    max_ratio=100.0,  # Bound on a token's ratio; 0.0: none.
    max_kl=10.0,  # Bound on the KL, in nats per token; 0.0: none.
    stop=False,  # Whether to stop beyond a bound, or only warn.
    min_used_fraction=0.1,  # Least fraction of groups with a gradient.
  )
  config.overlap = dict(  # train.grpo.train
    max_staleness=0,  # Steps that sampling may be ahead: 0 or 1.
  )
  config.experts = sections.get_experts()
  config.reference = dict(  # train.grpo_update.GrpoUpdate
    sync_every=64,  # Steps between syncs with the policy; 0: never.
    mix=0.6,  # Weight of the policy in the synced reference.
    dtype="",  # Its precision: bfloat16; empty: that of the parameters.
  )
  config.offload = sections.get_offload()
  config.offload.reference = False  # Whether to keep it in host memory.
  config.update(_get_batches())
  # The sections loss, advantages and groups define GRPO, DAPO, RLOO, ...
  config.update(_LOSSES[loss].get_config())
  config.schedule = sections.get_schedule()
  config.schedule.update(
    learning_rate=1e-6, schedule="constant", warmup_fraction=0.03
  )
  config.optimizer = optimizer.get_config()
  config.loop = sections.get_loop()
  config.loop.update(num_steps=250, eval_every=10, save_every=10)
  config.evaluation = dict(  # scripts.job.components.evaluation_rollouts
    num_questions=64,  # Held-out questions in an evaluation.
    num_bootstrap=1000,  # Resamples for the 95 % intervals.
    num_baselines=4,  # Answers to a question without a teaching.
    num_teachings=1,  # Teachings for a question.
    num_answers=1,  # Taught answers for a teaching.
  )
  config.report = sections.get_report()
  config.samples = dict(  # train.telemetry.samples.SampleLog
    log_completions_every=10,  # Steps between samples; 0: none.
    num_completions=8,  # Completions in a sample.
    stored_fraction=0.1,  # Probability that a teaching is stored.
    successful_reward=1.0,  # Reward from which every teaching is stored.
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
  config.world.directory = world.DIRECTORY
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


def _get_batches() -> ml_collections.ConfigDict:
  """Returns the sections that divide a step into batches."""
  return ml_collections.ConfigDict(
    dict(
      batch=dict(  # train.grpo_update.GrpoUpdate
        num_questions=4,  # Questions in a step.
        num_iterations=1,  # Passes over the completions of a step.
        num_minibatches=1,  # Updates in a pass.
        per_device=1,  # Rows on a device at once; 0: all of its rows.
        mask_truncated=True,  # Whether truncated completions do not count.
      ),
      packing=dict(  # train.batch_shapes.Layout
        length=4096,  # Tokens in a row, more if a sequence is longer.
        packed=True,  # Whether a row may hold several sequences.
      ),
      logits=dict(  # train.score.token_stats
        chunk_tokens=512,  # Tokens whose logits are in memory at once.
      ),
    )
  )


def get_sampling() -> ml_collections.ConfigDict:
  """Returns `types.SamplingParams` without seed for every protocol call."""
  return ml_collections.ConfigDict(
    dict(
      probe=_params(group_size=1, max_completion_tokens=50),
      baseline=_params(group_size=4, max_completion_tokens=4096),
      teach=_params(group_size=32, max_completion_tokens=1024),
      solve=_params(group_size=1, max_completion_tokens=4096),
    )
  )


def _params(
  group_size: int, max_completion_tokens: int
) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # types.SamplingParams
      group_size=group_size,  # Completions of a prompt.
      # Limit on a completion, in tokens.
      max_completion_tokens=max_completion_tokens,
      temperature=0.7,  # Sampling temperature; 0.0: greedy.
      top_p=1.0,  # Share of the probability to sample from; 1.0: all.
      top_k=0,  # Most likely tokens to sample from; 0: all.
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
