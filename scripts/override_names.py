# SPDX-License-Identifier: Apache-2.0
"""Names of config keys in the original implementation, TRL and verl.

`TABLE` has the names that the launchers accept. `suggest` finds the key that an
unknown name stands for.
"""

from collections.abc import Collection, Container, Iterable, Mapping
import dataclasses
import difflib

_ANSWERS = ("teach", "baseline", "solve", "complete")


@dataclasses.dataclass(frozen=True)
class Row:
  """A name and the config keys that it sets, where the recipe has them.

  Names without `paths` are handled by the code below. `words` maps values of
  the original to config values; `also` are further settings, `KEY=VALUE`.
  """

  meaning: str
  paths: tuple[str, ...] = ()
  words: Mapping[str, str] = dataclasses.field(default_factory=dict)
  also: tuple[str, ...] = ()


TABLE: Mapping[str, Row] = {
  "model_name_or_path": Row("model to train", ("model.path",)),
  "student_model": Row("student model", ("student.path",)),
  "teacher_model_name_or_path": Row("teacher model in GKD", ("teacher.path",)),
  "dataset_id_or_path": Row("training data", ("data.path",)),
  "dataset_max_samples": Row("limit on rows per dataset", ("data.max_rows",)),
  "eval_split_ratio": Row(
    "fraction of the problems that is held out", ("held_out.fraction",)
  ),
  "seed": Row("seed of all random numbers", ("seed",)),
  "output_dir": Row("the workdir"),
  "results_dir": Row("parent of the workdir, which is named after the recipe"),
  "report_to": Row(
    "comma-separated: `tensorboard`, `wandb`, `trackio`; `null` for none",
    ("report.to",),
  ),
  "wandb_project": Row("project in the tracker", ("report.project",)),
  "wandb_group_name": Row("group within the project", ("report.group",)),
  "wandb_run_name": Row("name of the run", ("report.name",)),
  "save_final_model": Row(
    "whether to write `export/` at the end", ("export.enabled",)
  ),
  "max_steps": Row("steps; for SFT and GKD, -1 uses `num_train_epochs`"),
  "num_train_epochs": Row("epochs; SFT and GKD only", ("num_epochs",)),
  "logging_steps": Row("steps between metrics", ("loop.log_every",)),
  "eval_steps": Row("steps between evaluations", ("loop.eval_every",)),
  "save_steps": Row("steps between checkpoints", ("loop.save_every",)),
  "save_strategy": Row(
    "`steps`, or `no` to save only at the end",
    ("loop.save_every",),
    {"no": "0"},
  ),
  "eval_strategy": Row(
    "`steps`, or `no` to evaluate only at the end",
    ("loop.eval_every",),
    {"no": "0"},
  ),
  "save_total_limit": Row("checkpoints to keep", ("checkpoint.keep",)),
  "metric_for_best_model": Row(
    "metric of the best checkpoint, which is kept too; `eval_x` is `eval/x`",
    ("checkpoint.best_metric",),
  ),
  "greater_is_better": Row(
    "whether the best value of that metric is the greatest",
    ("checkpoint.best_mode",),
    words={"true": "max", "false": "min"},
  ),
  "load_best_model_at_end": Row(
    "whether to finish with the best checkpoint instead of the last",
    ("checkpoint.load_best",),
  ),
  "learning_rate": Row("peak learning rate", ("schedule.learning_rate",)),
  "lr_scheduler_type": Row(
    "schedule: constant, linear, cosine, or wsd, which requires "
    "`--config.schedule.decay_fraction`",
    ("schedule.schedule",),
    words={"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"},
  ),
  "warmup_ratio": Row(
    "warmup, as a fraction of all steps",
    ("schedule.warmup_fraction",),
    also=("schedule.warmup_steps=0",),
  ),
  "warmup_steps": Row(
    "warmup, in steps",
    ("schedule.warmup_steps",),
    also=("schedule.warmup_fraction=0.0",),
  ),
  "optim": Row(
    "optimizer: adamw, lion, adafactor or muon",
    ("optimizer.name",),
    words={
      "adamw_torch": "adamw",
      "adamw_torch_fused": "adamw",
      "lion_32bit": "lion",
    },
  ),
  "weight_decay": Row(
    "weight decay of any optimizer", ("optimizer.weight_decay",)
  ),
  "adam_beta1": Row("beta1 of AdamW", ("optimizer.adamw.beta1",)),
  "adam_beta2": Row("beta2 of AdamW", ("optimizer.adamw.beta2",)),
  "adam_epsilon": Row("epsilon of AdamW", ("optimizer.adamw.epsilon",)),
  "max_grad_norm": Row(
    "norm to which gradients are clipped", ("optimizer.max_grad_norm",)
  ),
  "max_seq_length": Row("tokens in a row", ("packing.length",)),
  "packing": Row(
    "whether to pack several examples into a row", ("packing.packed",)
  ),
  "train_batch_size": Row(
    "sequences in a step: `batch.size`; in GKD `batch.num_prompts`; in RCL "
    "`batch.num_questions` times `num_generations`"
  ),
  "per_device_train_batch_size": Row(
    "rows per device in a microbatch: `batch.per_device`"
  ),
  "gradient_accumulation_steps": Row(
    "microbatches in an update, if rows are not packed: sets `batch.per_device`"
  ),
  "num_generations": Row(
    "teachings in a group", ("sampling.teach.group_size",)
  ),
  "temperature": Row(
    "temperature of all sampling",
    tuple(f"sampling.{kind}.temperature" for kind in ("probe", *_ANSWERS)),
  ),
  "max_completion_length": Row(
    "limit on tokens of teachings and answers, or of completions",
    tuple(f"sampling.{kind}.max_completion_tokens" for kind in _ANSWERS),
  ),
  "max_new_tokens": Row(
    "limit on tokens of completions in GKD",
    ("sampling.complete.max_completion_tokens",),
  ),
  "max_probe_tokens": Row(
    "limit on tokens of a probe", ("sampling.probe.max_completion_tokens",)
  ),
  "beta": Row(
    "weight of the KL term; in GKD, of the teacher in the mixture",
    ("loss.kl_coef", "loss.beta"),
  ),
  "lmbda": Row(
    "fraction of GKD steps with completions sampled from the policy",
    ("completions.on_policy_fraction",),
  ),
  "ref_model_sync_steps": Row(
    "steps between syncs of the reference", ("reference.sync_every",)
  ),
  "ref_model_mixup_alpha": Row(
    "weight of the policy in the synced reference", ("reference.mix",)
  ),
  "efficiency_weight": Row(
    "weight of the reward for short teachings",
    ("reward.teaching.efficiency_weight",),
  ),
  "degradation_penalty_multiplier": Row(
    "multiplier of the penalty for harmful teachings; presets R1 to R3",
    ("reward.teaching.degradation_penalty_multiplier",),
  ),
  "vllm_host": Row("host of the rollout servers; default 127.0.0.1"),
  "vllm_port": Row(
    "port of the first server, default 8765; the others use the ports after it"
  ),
}


_GROUP_SIZE = ("sampling.teach.group_size", "sampling.complete.group_size")
_COMPLETION = (
  "sampling.teach.max_completion_tokens",
  "sampling.complete.max_completion_tokens",
)
_BATCH = ("batch.size", "batch.num_questions", "batch.num_prompts")
_CLIP = ("loss.clip_low", "loss.clip_high")
# Other names of TRL and verl, whose sections are left out, and the keys of the
# same meaning. A recipe has some of them.
_FOREIGN: Mapping[str, tuple[str, ...]] = {
  "actor_rollout_ref.model.path": ("model.path",),
  "adv_estimator": ("advantages.baseline",),
  "attn_implementation": ("model.attention",),
  "batch_size": (*_BATCH, "batch_size"),
  "bf16": ("model.dtype",),
  "clip_grad": ("optimizer.max_grad_norm",),
  "clip_ratio": _CLIP,
  "clip_ratio_high": ("loss.clip_high",),
  "clip_ratio_low": ("loss.clip_low",),
  "cliprange": _CLIP,
  "dataset_name": ("data.path",),
  "delta": ("loss.max_ratio",),
  "enable_gradient_checkpointing": ("model.remat",),
  "entropy_coeff": ("loss.entropy_coef",),
  "epochs": ("num_epochs",),
  "epsilon": _CLIP,
  "epsilon_high": ("loss.clip_high",),
  "eval_dataset": ("held_out.path",),
  "experiment_name": ("report.name",),
  "fp16": ("model.dtype",),
  "gradient_checkpointing": ("model.remat",),
  "importance_sampling_level": ("loss.ratio",),
  "init_kl_coef": ("loss.kl_coef",),
  "kl_coef": ("loss.kl_coef",),
  "kl_loss_coef": ("loss.kl_coef",),
  "kl_loss_type": ("loss.kl_estimator",),
  "kl_penalty": ("loss.kl_estimator",),
  "lambda": ("completions.on_policy_fraction",),
  "logger": ("report.to",),
  "lora_alpha": ("lora.alpha",),
  "lora_r": ("lora.rank",),
  "lora_rank": ("lora.rank",),
  "loss_agg_mode": ("loss.aggregate",),
  "loss_type": ("loss.aggregate",),
  "lr": ("schedule.learning_rate",),
  "lr_scheduler": ("schedule.schedule",),
  "lr_warmup_steps": ("schedule.warmup_steps",),
  "lr_warmup_steps_ratio": ("schedule.warmup_fraction",),
  "mask_truncated_completions": ("batch.mask_truncated",),
  "max_length": ("packing.length",),
  "max_prompt_length": ("roles.policy.max_prompt_tokens",),
  "max_response_length": _COMPLETION,
  "max_tokens": _COMPLETION,
  "model": ("model.path",),
  "model_name": ("model.path",),
  "n": _GROUP_SIZE,
  "norm_adv_by_std_in_grpo": ("advantages.scale",),
  "num_generations": _GROUP_SIZE,
  "num_iterations": ("batch.num_iterations",),
  "ppo_epochs": ("batch.num_iterations",),
  "ppo_micro_batch_size_per_gpu": ("batch.per_device",),
  "ppo_mini_batch_size": ("batch.num_minibatches",),
  "project_name": ("report.project",),
  "resume_from_checkpoint": ("--workdir",),
  "rho": ("correction.max_ratio",),
  "run_name": ("report.name",),
  "save_freq": ("loop.save_every",),
  "scale_rewards": ("advantages.scale",),
  "steps": ("loop.num_steps",),
  "target_modules": ("lora.targets",),
  "teacher_model": ("teacher.path",),
  "test_freq": ("loop.eval_every",),
  "torch_dtype": ("model.dtype",),
  "total_epochs": ("num_epochs",),
  "total_training_steps": ("loop.num_steps",),
  "train_files": ("data.path",),
  "val_files": ("held_out.path",),
  "vllm_importance_sampling_cap": ("correction.max_ratio",),
  "vllm_server_base_url": ("rollout.policy_urls",),
  "warmup_style": ("schedule.schedule",),
}
# Names of `TABLE` that set several keys or none by themselves.
_COMPUTED: Mapping[str, tuple[str, ...]] = {
  "gradient_accumulation_steps": ("batch.per_device",),
  "max_steps": ("loop.num_steps",),
  "output_dir": ("--workdir",),
  "per_device_train_batch_size": ("batch.per_device",),
  "results_dir": ("--workdir",),
  "train_batch_size": _BATCH,
  "vllm_host": ("rollout.policy_urls",),
  "vllm_port": ("rollout.policy_urls",),
}
_MAX_SUGGESTED = 4
_CONFIG = "--config."


def suggest(name: str, keys: Collection[str]) -> list[str]:
  """Returns the keys of a config that an unknown dotted name may stand for.

  In this order: keys of the same meaning as the name, or its end, in another
  library; keys with the same last part; keys that are spelt alike.

  Args:
    name: without `--config.`.
    keys: dotted names of all keys; a flag is suggested as `--NAME`.
  """
  parts = name.split(".")
  for start in range(len(parts)):
    end = ".".join(parts[start:])
    row = TABLE.get(end)
    known = _COMPUTED.get(end) or _FOREIGN.get(end) or (row and row.paths) or ()
    found = [key for key in known if key in keys or key.startswith("--")]
    if found:
      return found[:_MAX_SUGGESTED]
  same = [key for key in keys if key.rpartition(".")[2] == parts[-1]]
  if same:
    return same[:_MAX_SUGGESTED]
  if near := difflib.get_close_matches(name, keys, n=2, cutoff=0.75):
    return near
  last = {key.rpartition(".")[2] for key in keys}
  near = difflib.get_close_matches(parts[-1], last, n=1, cutoff=0.75)
  found = [key for key in keys if key.rpartition(".")[2] in near]
  return found[:_MAX_SUGGESTED]


def advice(
  words: Iterable[str], keys: Collection[str], known_flags: Container[str]
) -> str:
  """Returns what the unknown names on a command line may stand for, or "".

  Args:
    words: arguments such as `--config.KEY=VALUE` and `--NAME=VALUE`.
    keys: dotted names of all config keys.
    known_flags: names of all flags.
  """
  lines = []
  for name in dict.fromkeys(word.partition("=")[0] for word in words):
    key = name.removeprefix(_CONFIG)
    if name.startswith(_CONFIG):
      is_known = any(f"{each}.".startswith(f"{key}.") for each in keys)
    else:
      key = name.lstrip("-")
      is_known = not name.startswith("-") or key in known_flags
    if not is_known and (found := suggest(key, keys)):
      names = (k if k.startswith("--") else f"{_CONFIG}{k}" for k in found)
      lines.append(f"{name}: did you mean {' or '.join(names)}?")
  return " ".join(lines)
