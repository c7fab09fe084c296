# SPDX-License-Identifier: Apache-2.0
"""Resolves the launchers' `NAME=VALUE` overrides into config values.

The names are those of the original implementation. `docs/overrides.md` is
generated from the table:

  python -m scripts.launch_overrides > docs/overrides.md
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import pathlib

from absl import flags
from ml_collections import config_flags

from atlas_jax import errors, types

_RECIPES = pathlib.Path("configs/run")
_NONE = ("null", "none", "[]")
_OFFLOAD, _ZERO1 = "offload", "zero1"  # The original's words for DeepSpeed.
_STRATEGIES = ("save_strategy", "eval_strategy")
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


@dataclasses.dataclass(frozen=True)
class LaunchRequest:
  """A recipe with its overrides, its workdir and its servers' address.

  `origins` maps a dotted config key to the argument that set it.
  """

  recipe: str
  settings: tuple[str, ...]
  origins: Mapping[str, str]
  config: types.Config
  workdir: pathlib.Path
  host: str | None
  port: int | None


def find_recipe(name: str) -> str:
  """Returns `FILE.py[:VARIANT]` for the name of a recipe.

  `configs/run/` and the suffix are optional; a suffix `.yaml` means `.py`.

  Raises:
    errors.ConfigError: if the recipe is not found.
  """
  spelt, _, variant = name.partition(":")
  path = pathlib.Path(spelt).with_suffix(".py")
  if path.parent == pathlib.Path():
    path = _RECIPES / path
  if not path.is_file():
    known = sorted(p.stem for p in _RECIPES.glob("[!_]*.py"))
    raise _unknown(name, "Unknown recipe.", path.stem, known)
  return f"{path}:{variant}" if variant else str(path)


def resolve(
  recipe: str, words: Sequence[str], *, num_devices: int
) -> LaunchRequest:
  """Translates overrides to config settings, and loads the resulting config.

  Args:
    recipe: from `find_recipe`.
    words: `--config.KEY=VALUE`, `NAME=VALUE` and `offload`; later ones win.
    num_devices: number of training devices.

  Raises:
    errors.ConfigError: if a name is unknown or a value is invalid.
  """
  given, settings, origins = _read_words(load(recipe, []), words)
  config = load(recipe, settings)
  for path, number in _sizes(given, config, num_devices).items():
    settings.append(f"--config.{path}={number}")
  if _OFFLOAD in words:
    settings += _offload(config)
  path, _, variant = recipe.partition(":")
  folder = "-".join(filter(None, [pathlib.Path(path).stem, variant]))
  results = pathlib.Path(given.get("results_dir", "results"))
  config = load(recipe, settings)
  if config.data.path is None:
    raise errors.ConfigError(
      "data.path is not set.",
      where=recipe,
      why="This recipe has no default training data.",
      fix="Set dataset_id_or_path to a file, a folder or a Hub dataset.",
    )
  return LaunchRequest(
    recipe,
    tuple(settings),
    origins,
    config,
    pathlib.Path(given.get("output_dir", results / folder)),
    given.get("vllm_host"),
    int(given["vllm_port"]) if "vllm_port" in given else None,
  )


def _read_words(
  base: types.Config,
  words: Sequence[str],
) -> tuple[dict[str, str], list[str], dict[str, str]]:
  """Parses the arguments after the recipe.

  Returns:
    The value of each bare name; settings `--config.KEY=VALUE`, in order; and
    the argument that set each config key.
  """
  given: dict[str, str] = {}
  settings: list[str] = []
  origins: dict[str, str] = {}
  for word in words:
    name, equals, value = word.partition("=")
    if word == _OFFLOAD:
      continue
    if word == _ZERO1:
      raise errors.ConfigError(
        f"{word} is not supported.",
        where=word,
        why="Parameters and optimizer state are always sharded together, over "
        "the mesh axis fsdp.",
        fix="Leave it out, or replicate both with --config.mesh.data=-1 "
        "--config.mesh.fsdp=1.",
      )
    if name.startswith("--config."):
      settings.append(word)
      origins[path_of(word)] = "command line"
      continue
    if not equals or name not in TABLE:
      raise _unknown(word, "Unknown override.", name, list(TABLE))
    given[name] = value
    direct = _direct_settings(base, name, value)
    settings += direct
    origins |= dict.fromkeys(map(path_of, direct), word)
  return given, settings, origins


def _direct_settings(
  base: types.Config,
  name: str,
  value: str,
) -> list[str]:
  """Returns the settings of one name that do not depend on other names."""
  if name == "report_to" and value.lower() in _NONE:
    return ["--config.report.to=none"]
  if name == "vllm_port" and not (value.isdigit() and 0 < int(value) < 65536):
    raise _invalid(name, value, "it must be a port number", "8765")
  if name == "max_steps" and "num_epochs" in base:
    steps = [f"--config.loop.num_steps={value}", "--config.num_epochs=0"]
    return steps if value != "-1" else []
  if name in _STRATEGIES and value not in ("no", "steps"):
    raise _invalid(name, value, "it must be no or steps", "steps")
  if name in _STRATEGIES and value == "steps":
    return []
  paths = ("loop.num_steps",) if name == "max_steps" else TABLE[name].paths
  present = [path for path in paths if has(base, path)]
  if paths and not present:
    raise _invalid(name, value, "this recipe does not have this setting", None)
  if paths and value.lower() in _NONE:
    raise _invalid(name, value, "it needs a value", None)
  row = TABLE[name]
  value = row.words.get(value.lower(), value)
  if name == "metric_for_best_model":
    value = "eval/" + value.removeprefix("eval_").removeprefix("eval/")
  pairs = [*(f"{path}={value}" for path in present), *row.also]
  return [f"--config.{pair}" for pair in pairs]


def path_of(setting: str) -> str:
  """Returns the dotted key that `--config.KEY=VALUE` sets."""
  return setting.removeprefix("--config.").partition("=")[0]


def has(config: types.Config, path: str) -> bool:
  """Returns whether a config has a value with this dotted key."""
  *parents, last = path.split(".")
  for key in parents:
    if key not in config:
      return False
    config = config[key]
  return last in config


def _sizes(
  given: Mapping[str, str],
  config: types.Config,
  num_devices: int,
) -> dict[str, int]:
  """Returns the batch sizes that the given sizes imply, by config key.

  rows of an update = sequences in a step / minibatches
                    = per_device * num_devices * microbatches
  """
  sizes: dict[str, int] = {}
  group_size, num_minibatches = 1, 1
  if has(config, "sampling.teach"):
    group_size = config.sampling.teach.group_size
    num_minibatches = config.batch.num_minibatches
  counts = ("size", "num_questions", "num_prompts")
  (count,) = (name for name in counts if name in config.batch)
  of_rows = f"batch.{count}"
  rows = group_size * config.batch[count]
  if (name := "train_batch_size") in given:
    rows = _number(name, given[name])
    sizes[of_rows] = _divide(name, given[name], rows, group_size)
  rows //= num_minibatches
  parts = None
  if (name := "gradient_accumulation_steps") in given:
    parts = _number(name, given[name])
    _divide(name, given[name], rows, parts * num_devices)
  if (name := "per_device_train_batch_size") in given:
    at_once = _number(name, given[name])
    needed = _divide(name, given[name], rows, at_once * num_devices)
    if parts not in (None, needed):
      raise _invalid(
        "gradient_accumulation_steps",
        given["gradient_accumulation_steps"],
        f"{name} on {num_devices} devices requires {needed}",
        str(needed),
      )
    parts = needed
  if parts:
    sizes["batch.per_device"] = rows // (parts * num_devices)
  return sizes


def _offload(config: types.Config) -> list[str]:
  """Returns settings that offload all state that the recipe can offload."""
  has_reference = has(config, "loss.kl_coef") and config.loss.kl_coef > 0
  return [
    f"--config.offload.{part}=True"
    for part in config.offload
    if part != "reference" or has_reference
  ]


def _number(name: str, value: str) -> int:
  if not value.isdigit() or not int(value):
    raise _invalid(name, value, "it must be an integer of at least 1", None)
  return int(value)


def _divide(name: str, value: str, rows: int, divisor: int) -> int:
  if rows % divisor:
    why = f"{rows} sequences are not divisible by {divisor}"
    raise _invalid(name, value, why, None)
  return rows // divisor


def load(recipe: str, settings: Sequence[str]) -> types.Config:
  """Loads the config of a recipe, as the training script does."""
  values = flags.FlagValues()
  argv = ["launch", f"--config={recipe}", *settings]
  config_flags.DEFINE_config_file(
    "config", lock_config=True, flag_values=values, sys_argv=argv
  )
  try:
    values(argv)
    return values["config"].value
  except (
    flags.Error,
    OSError,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
  ) as error:
    raise errors.ConfigError(
      "Invalid recipe or config value.",
      where=" ".join(argv[1:]),
      # If a recipe raises, this is a traceback that ends with the message.
      why=str(error).strip().splitlines()[-1],
      fix="See docs/overrides.md, and the recipe for its --config.KEY names.",
    ) from error


def _unknown(
  word: str, what: str, name: str, known: Sequence[str]
) -> errors.ConfigError:
  near = difflib.get_close_matches(name, known, n=1)
  return errors.ConfigError(
    what,
    where=word,
    why=f"Valid names are {', '.join(known)}.",
    fix=f"Did you mean {near[0]}?" if near else "Choose one of these.",
  )


def _invalid(
  name: str, value: str, why: str, better: str | None
) -> errors.ConfigError:
  return errors.ConfigError(
    f"Invalid override {name}={value}.",
    where=f"{name}={value}",
    why=f"{why[0].upper()}{why[1:]}.",
    fix=f"Set {name}={better}." if better else "Leave it out, or change it.",
  )


def markdown() -> str:
  """Returns the text of `docs/overrides.md`."""
  lines = [
    "# Launcher overrides",
    "",
    "`scripts/launch.sh` and `scripts/launch_with_server.sh` accept any config",
    "value as `--config.KEY=VALUE`, and the names below as `NAME=VALUE`. Other",
    "names are errors. Regenerate this page with",
    "`python -m scripts.launch_overrides > docs/overrides.md`.",
    "",
    "| name | sets `--config.` | meaning |",
    "|---|---|---|",
  ]
  for name, row in TABLE.items():
    paths = ", ".join(f"`{path}`" for path in row.paths)
    lines.append(f"| `{name}` | {paths} | {row.meaning} |")
  lines += [
    "",
    "`offload`, anywhere among the overrides, sets `--config.offload.*`: the",
    "optimizer moments and the frozen reference are kept in host memory, and",
    "copied to the devices while a step needs them. Parameters stay on the",
    "devices, and results do not change. If the devices cannot access host",
    "memory, it is an error. Not tested on a GPU or TPU yet.",
  ]
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  print(markdown(), end="")
