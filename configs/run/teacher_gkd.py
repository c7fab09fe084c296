# SPDX-License-Identifier: Apache-2.0
"""GKD: distils a large teacher into a smaller policy.

  python -m scripts.train_gkd --config=configs/run/teacher_gkd.py \
    --workdir=results/gkd --config.data.path=conversations.jsonl

Sized for 8 GPUs with 80 GB; not run on them yet. `:smoke` runs on a CPU.
"""

import ml_collections

from configs import lora, mesh, optimizer, rollout, sections
from configs.data import selection, world
from configs.model import frozen, hf, tiny


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.recipe = "gkd"  # Kind of run, which one script runs; fixed.
  config.seed = 42  # Seed of all random numbers.
  config.world = sections.get_world()
  config.model = hf.get_config("Qwen/Qwen2.5-7B-Instruct")
  config.teacher = frozen.get_config("Qwen/Qwen2.5-14B-Instruct")
  config.lora = lora.get_config()
  config.mesh = mesh.get_config()
  config.data = selection.get_config()
  config.held_out = sections.get_held_out()
  config.held_out.fraction = 0.1
  config.sampler = sections.get_sampler()
  config.rollout = rollout.get_config()
  config.sampling = dict(
    complete=dict(  # types.SamplingParams
      group_size=1,  # Completions of a prompt.
      max_completion_tokens=512,  # Limit on a completion, in tokens.
      temperature=0.9,  # Sampling temperature; 0.0: greedy.
      top_p=1.0,  # Share of the probability to sample from; 1.0: all.
      top_k=0,  # Most likely tokens to sample from; 0: all.
    )
  )
  config.completions = dict(  # train.gkd_batches.CompletionBatches
    # Fraction of the steps whose completions the policy writes.
    on_policy_fraction=1.0,
    # Fraction of completions that late servers may drop from a batch.
    max_dropped_fraction=0.25,
  )
  config.agreement = sections.get_agreement()
  config.agreement.every_steps = 10
  config.packing = dict(  # data.sets.Layout
    length=8192,  # Tokens of a prompt with its completion, and of a row.
    packed=True,  # Whether a row may hold several of them.
    too_long="drop",  # If longer than a row: drop, truncate or error.
  )
  config.batch = dict(  # train.batch_shapes.of_gkd
    num_prompts=256,  # Prompts in a step.
    per_device=1,  # Rows on a device at once; 0: all of its rows.
  )
  config.num_epochs = 3.0  # Passes over the data; 0: use loop.num_steps.
  config.loss = dict(  # train.gkd.packed_loss
    beta=0.5,  # Weight of the teacher in the mixture of the divergence.
    temperature=1.0,  # Divides the logits of both models.
    chunk_tokens=512,  # Tokens whose logits are in memory at once.
  )
  config.experts = sections.get_experts()
  config.schedule = sections.get_schedule()
  config.schedule.update(learning_rate=5e-6, warmup_fraction=0.1)
  config.optimizer = optimizer.get_config()
  config.optimizer.weight_decay = 0.01
  config.offload = sections.get_offload()
  config.loop = sections.get_loop()
  config.loop.log_every = 10
  config.report = sections.get_report()
  config.checkpoint = sections.get_checkpoint()
  config.checkpoint.load_best = True
  config.export = sections.get_export()

  if variant == "smoke":
    _make_smoke(config)
  elif variant != "full":
    raise ValueError(f"Unknown variant {variant!r}; there is :smoke.")
  return config


def _make_smoke(config: ml_collections.ConfigDict) -> None:
  """Distils the small world's teacher into its untrained initial weights."""
  config.world.directory = world.DIRECTORY
  config.model = tiny.get_config(f"{world.DIRECTORY}/teacher_init")
  config.teacher = tiny.get_config(world.TEACHER)
  config.teacher.remat = "none"
  config.data.path = f"{world.DIRECTORY}/teacher_sft.jsonl"
  config.rollout.dtype = "float32"
  config.sampling.complete.max_completion_tokens = 64
  config.completions.on_policy_fraction = 0.5
  config.agreement.max_prob_error = 1.0005  # In float32.
  config.packing.length = 128
  config.batch = dict(num_prompts=64, per_device=0)
  config.num_epochs = 0.0
  config.loss.chunk_tokens = 128
  config.schedule.learning_rate = 3e-3
  config.optimizer.adamw.beta2 = 0.98
  config.loop.num_steps = 100
  config.loop.log_every = 5
  config.loop.eval_every = 25
  config.loop.save_every = 50
  config.export.dtype = "float32"
