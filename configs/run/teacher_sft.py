# SPDX-License-Identifier: Apache-2.0
"""SFT warm-up of a teacher.

  python -m scripts.train_sft --config=configs/run/teacher_sft.py \
    --workdir=results/sft --config.data.path=my.jsonl

Sized for 8 GPUs with 80 GB; not run on them yet. `:smoke` runs on a CPU.
"""

import ml_collections

from configs import lora, mesh, optimizer, sections
from configs.data import arc_atlas, selection, world
from configs.model import hf, tiny


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.recipe = "sft"  # Kind of run, which one script runs; fixed.
  config.seed = 42  # Seed of all random numbers.
  config.world = sections.get_world()
  config.model = hf.get_config("Qwen/Qwen3-8B")
  config.lora = lora.get_config()
  config.mesh = mesh.get_config()
  config.data = selection.get_config()
  config.data.formats = arc_atlas.get_formats()
  config.held_out = sections.get_held_out()
  config.held_out.fraction = 0.05
  config.packing = dict(  # data.sets.Layout
    length=0,  # Tokens in a row; 0: min(16384, the model's context).
    packed=True,  # Whether a row may hold several conversations.
    too_long="drop",  # If longer than a row: drop, truncate or error.
  )
  config.batch = dict(  # sharding.num_microbatches
    size=16,  # Rows in a step.
    per_device=1,  # Rows on a device at once; 0: all of its rows.
  )
  config.num_epochs = 10.0  # Passes over the data; 0: use loop.num_steps.
  config.loss = dict(  # train.sft.packed_loss
    z_loss_coef=0.0,  # Weight of the squared log-sum-exp of the logits.
    chunk_tokens=512,  # Tokens whose logits are in memory at once.
  )
  config.experts = sections.get_experts()
  config.schedule = sections.get_schedule()
  config.schedule.warmup_fraction = 0.05
  config.optimizer = optimizer.get_config()
  config.optimizer.weight_decay = 1e-4
  config.optimizer.adamw.beta2 = 0.95
  config.offload = sections.get_offload()
  config.loop = sections.get_loop()
  config.report = sections.get_report()
  config.checkpoint = sections.get_checkpoint()
  config.export = sections.get_export()

  if variant == "smoke":
    _make_smoke(config)
  elif variant != "full":
    raise ValueError(f"Unknown variant {variant!r}; there is :smoke.")
  return config


def _make_smoke(config: ml_collections.ConfigDict) -> None:
  """Trains a teacher of the small world."""
  config.world.directory = world.DIRECTORY
  config.model = tiny.get_config(f"{world.DIRECTORY}/teacher_init")
  config.data.path = f"{world.DIRECTORY}/teacher_sft.jsonl"
  config.packing.length = 128
  config.batch = dict(size=32, per_device=0)
  config.num_epochs = 6.0
  config.loss.chunk_tokens = 128
  config.schedule.learning_rate = 3e-3
  config.optimizer.adamw.beta2 = 0.98
  config.loop.log_every = 20
  config.loop.eval_every = 0
  config.export.dtype = "float32"
