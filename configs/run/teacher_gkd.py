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
  config.recipe = "gkd"
  config.seed = 42
  config.world = sections.get_world()
  config.model = hf.get_config("Qwen/Qwen2.5-7B-Instruct")
  config.teacher = frozen.get_config("Qwen/Qwen2.5-14B-Instruct")
  config.lora = lora.get_config()
  config.mesh = mesh.get_config()
  config.data = selection.get_config()
  config.held_out = dict(path="", fraction=0.1)  # data.sets.HeldOut
  config.sampler = dict(max_rows=256)  # rollout.sampler.open_sampler
  config.rollout = rollout.get_config()
  config.sampling = dict(
    complete=dict(  # types.SamplingParams
      group_size=1,
      max_completion_tokens=512,
      temperature=0.9,
      top_p=1.0,
      top_k=0,
    )
  )
  config.completions = dict(  # train.gkd_batches.CompletionBatches
    on_policy_fraction=1.0, max_dropped_fraction=0.25
  )
  # Mean error factor of token probabilities between trainer and sampler.
  config.agreement = dict(  # guards.agreement
    max_prob_error=1.02, every_steps=10
  )
  # `length` limits a prompt with its completion, and a packed row, in tokens.
  config.packing = dict(length=8192, packed=True, too_long="drop")
  config.batch = dict(num_prompts=256, per_device=1)
  config.num_epochs = 3.0  # 0: use `loop.num_steps`.
  # `temperature` divides the logits of both models.
  config.loss = dict(beta=0.5, temperature=1.0, chunk_tokens=512)
  config.experts = dict(router_aux_coef=0.0)  # train.score.add_balance
  config.schedule = dict(  # train.schedule.make
    learning_rate=5e-6,
    schedule="cosine",
    warmup_fraction=0.1,
    warmup_steps=0,
    decay_fraction=0.0,
  )
  config.optimizer = optimizer.get_config()
  config.optimizer.weight_decay = 0.01
  config.offload = dict(optimizer=False)  # train.train_state.Offload
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
