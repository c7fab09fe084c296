# SPDX-License-Identifier: Apache-2.0
"""The bare `key=value` names that the launchers take, in one table.

They are the original's names. `docs/overrides.md` is this table:

  python -m scripts.launch_overrides > docs/overrides.md
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags

from atlas_jax import errors

_RECIPES = pathlib.Path("configs/run")
_NONE = ("null", "none", "[]")
_OFFLOAD, _ZERO1 = "offload", "zero1"  # The original's words for DeepSpeed.
_STRATEGIES = ("save_strategy", "eval_strategy")
_ANSWERS = ("teach", "baseline", "solve", "complete")


@dataclasses.dataclass(frozen=True)
class Row:
  """A name, and the config values it sets: those that the recipe has.

  Without `paths`, code below gives it its meaning. `words` are what values are
  called here, `also` what is set with it.
  """

  meaning: str
  paths: tuple[str, ...] = ()
  words: Mapping[str, str] = dataclasses.field(default_factory=dict)
  also: tuple[str, ...] = ()


TABLE: Mapping[str, Row] = {
  "model_name_or_path": Row("model to train", ("model.path",)),
  "student_model": Row("the student", ("student.path",)),
  "teacher_model_name_or_path": Row(
    "the model that GKD distils", ("teacher.path",)
  ),
  "dataset_id_or_path": Row("data to train on", ("data.path",)),
  "dataset_max_samples": Row("rows of each dataset", ("data.max_rows",)),
  "eval_split_ratio": Row(
    "part of the problems that is held out", ("held_out.fraction",)
  ),
  "seed": Row("decides every random number", ("seed",)),
  "output_dir": Row("the workdir"),
  "results_dir": Row("the workdir is a folder of the recipe's name in it"),
  "report_to": Row(
    "`tensorboard`, `wandb`, `trackio`, with commas between; `null` for none",
    ("report.to",),
  ),
  "wandb_project": Row("what trackers file the run under", ("report.project",)),
  "wandb_group_name": Row("likewise, within it", ("report.group",)),
  "wandb_run_name": Row("the run's name there", ("report.name",)),
  "save_final_model": Row("write `export/` at the end", ("export.enabled",)),
  "max_steps": Row(
    "steps; for SFT and GKD, -1 leaves it to `num_train_epochs`"
  ),
  "num_train_epochs": Row("passes over the data; SFT and GKD", ("num_epochs",)),
  "logging_steps": Row("steps between metrics", ("loop.log_every",)),
  "eval_steps": Row("steps between evaluations", ("loop.eval_every",)),
  "save_steps": Row("steps between checkpoints", ("loop.save_every",)),
  "save_strategy": Row(
    "`steps`, or `no` for the end alone", ("loop.save_every",), {"no": "0"}
  ),
  "eval_strategy": Row("likewise", ("loop.eval_every",), {"no": "0"}),
  "save_total_limit": Row("checkpoints kept", ("checkpoint.keep",)),
  "metric_for_best_model": Row(
    "its best checkpoint is kept too; `eval_x` is `eval/x`",
    ("checkpoint.best_metric",),
  ),
  "greater_is_better": Row(
    "whether that is the greatest",
    ("checkpoint.best_mode",),
    words={"true": "max", "false": "min"},
  ),
  "load_best_model_at_end": Row(
    "end with it, not with the last", ("checkpoint.load_best",)
  ),
  "learning_rate": Row("its peak", ("schedule.learning_rate",)),
  "lr_scheduler_type": Row(
    "its course: constant, linear, cosine, or wsd, which needs "
    "`--config.schedule.decay_fraction`",
    ("schedule.schedule",),
    words={"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"},
  ),
  "warmup_ratio": Row(
    "warm-up, as a part of all updates",
    ("schedule.warmup_fraction",),
    also=("schedule.warmup_updates=0",),
  ),
  "warmup_steps": Row(
    "warm-up, in updates",
    ("schedule.warmup_updates",),
    also=("schedule.warmup_fraction=0.0",),
  ),
  "optim": Row(
    "adamw, lion, adafactor or muon",
    ("optimizer.name",),
    words={
      "adamw_torch": "adamw",
      "adamw_torch_fused": "adamw",
      "lion_32bit": "lion",
    },
  ),
  "weight_decay": Row("of any optimizer", ("optimizer.weight_decay",)),
  "adam_beta1": Row("of AdamW", ("optimizer.adamw.beta1",)),
  "adam_beta2": Row("of AdamW", ("optimizer.adamw.beta2",)),
  "adam_epsilon": Row("of AdamW", ("optimizer.adamw.epsilon",)),
  "max_grad_norm": Row("clips the gradient", ("optimizer.max_grad_norm",)),
  "max_seq_length": Row("tokens of a row", ("packing.length",)),
  "packing": Row("several examples in a row", ("packing.packed",)),
  "train_batch_size": Row(
    "sequences in a step: `batch.size`, for GKD `batch.num_prompts`, for RCL "
    "`batch.num_questions` times `num_generations`"
  ),
  "per_device_train_batch_size": Row(
    "rows on a device at once: `batch.per_device`"
  ),
  "gradient_accumulation_steps": Row(
    "parts of an update, if rows are not packed: decides `batch.per_device`"
  ),
  "num_generations": Row(
    "teachings in a group", ("sampling.teach.group_size",)
  ),
  "temperature": Row(
    "of all kinds of sampling",
    tuple(f"sampling.{kind}.temperature" for kind in ("probe", *_ANSWERS)),
  ),
  "max_completion_length": Row(
    "tokens of teachings and answers, or of completions",
    tuple(f"sampling.{kind}.max_completion_tokens" for kind in _ANSWERS),
  ),
  "max_new_tokens": Row(
    "the same, in GKD", ("sampling.complete.max_completion_tokens",)
  ),
  "max_probe_tokens": Row(
    "tokens of a probe", ("sampling.probe.max_completion_tokens",)
  ),
  "beta": Row(
    "weight of the KL term; in GKD, of the teacher in the mixture",
    ("loss.kl_coef", "loss.beta"),
  ),
  "lmbda": Row(
    "the part of GKD's steps whose completions the policy writes",
    ("completions.on_policy_fraction",),
  ),
  "ref_model_sync_steps": Row(
    "steps between syncs of the reference", ("reference.sync_every",)
  ),
  "ref_model_mixup_alpha": Row(
    "the policy's part in the synced reference", ("reference.mix",)
  ),
  "efficiency_weight": Row(
    "of brevity", ("reward.teaching.efficiency_weight",)
  ),
  "degradation_penalty_multiplier": Row(
    "of harm; presets R1 to R3",
    ("reward.teaching.degradation_penalty_multiplier",),
  ),
  "vllm_host": Row("host of the rollout servers, 127.0.0.1 if not given"),
  "vllm_port": Row("the first one's port, 8765 if not given; the rest follow"),
}


@dataclasses.dataclass(frozen=True)
class LaunchRequest:
  """A recipe with its overrides: what is trained, and where.

  `origins` holds the word behind a setting, by the config value's name.
  """

  recipe: str
  settings: tuple[str, ...]
  origins: Mapping[str, str]
  config: Any  # Any: a ConfigDict, whose values have no static type.
  workdir: pathlib.Path
  host: str | None
  port: int | None


def find_recipe(name: str) -> str:
  """Gives `FILE.py[:VARIANT]` for a recipe, however it is spelt.

  `configs/run/` and the ending may be left out, and the ending may be `.yaml`.

  Raises:
    errors.ConfigError: if there is no such recipe.
  """
  spelt, _, variant = name.partition(":")
  path = pathlib.Path(spelt).with_suffix(".py")
  if path.parent == pathlib.Path():
    path = _RECIPES / path
  if not path.is_file():
    known = sorted(p.stem for p in _RECIPES.glob("[!_]*.py"))
    raise _refused(name, "There is no such recipe.", path.stem, known)
  return f"{path}:{variant}" if variant else str(path)


def resolve(
  recipe: str, words: Sequence[str], *, num_devices: int
) -> LaunchRequest:
  """Gives bare names their meaning, and loads the config they make.

  Args:
    recipe: as `find_recipe` gives it.
    words: `--config.KEY=VALUE` and `NAME=VALUE`, the later one counts; and
      `offload`.
    num_devices: that train.

  Raises:
    errors.ConfigError: for a name or a value that cannot be honoured.
  """
  base = load(recipe, [])
  settings: list[str] = []
  origins: dict[str, str] = {}
  given: dict[str, str] = {}
  for word in words:
    name, equals, value = word.partition("=")
    if word == _OFFLOAD:
      continue
    if word == _ZERO1:
      raise errors.ConfigError(
        f"There is no {word}.",
        where=word,
        why="Parameters and optimizer state are always split together, over "
        "the devices of --config.mesh.fsdp.",
        fix="Leave it out, or keep whole copies by --config.mesh.data=-1 "
        "--config.mesh.fsdp=1.",
      )
    if name.startswith("--config."):
      settings.append(word)
      origins[path_of(word)] = "command line"
      continue
    if not equals or name not in TABLE:
      raise _refused(word, "There is no such override.", name, list(TABLE))
    given[name] = value
    direct = _direct(base, name, value)
    settings += direct
    origins |= dict.fromkeys(map(path_of, direct), word)
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
      "The config names no data.",
      where=recipe,
      why="This recipe leaves it to you.",
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


def _direct(
  base: Any,  # Any: as in `LaunchRequest`.
  name: str,
  value: str,
) -> list[str]:
  """Sets the config values of one name."""
  if name == "report_to" and value.lower() in _NONE:
    return ["--config.report.to=none"]
  if name == "vllm_port" and not (value.isdigit() and 0 < int(value) < 65536):
    raise _unfit(name, value, "a port is a number", "8765")
  if name == "max_steps" and "num_epochs" in base:
    steps = [f"--config.loop.num_steps={value}", "--config.num_epochs=0"]
    return steps if value != "-1" else []
  if name in _STRATEGIES and value not in ("no", "steps"):
    raise _unfit(name, value, "how often is told in steps", "steps")
  if name in _STRATEGIES and value == "steps":
    return []
  paths = ("loop.num_steps",) if name == "max_steps" else TABLE[name].paths
  present = [path for path in paths if has(base, path)]
  if paths and not present:
    raise _unfit(name, value, "this recipe has no such setting", None)
  if paths and value.lower() in _NONE:
    raise _unfit(name, value, "it needs a value", None)
  row = TABLE[name]
  value = row.words.get(value.lower(), value)
  if name == "metric_for_best_model":
    value = "eval/" + value.removeprefix("eval_").removeprefix("eval/")
  pairs = [*(f"{path}={value}" for path in present), *row.also]
  return [f"--config.{pair}" for pair in pairs]


def path_of(setting: str) -> str:
  """Gives the dotted name that `--config.NAME=VALUE` sets."""
  return setting.removeprefix("--config.").partition("=")[0]


def has(config: Any, path: str) -> bool:  # Any: as in `LaunchRequest`.
  """Tells whether a config has a value of that dotted name."""
  *parents, last = path.split(".")
  for key in parents:
    if key not in config:
      return False
    config = config[key]
  return last in config


def _sizes(
  given: Mapping[str, str],
  config: Any,  # Any: as in `LaunchRequest`.
  num_devices: int,
) -> dict[str, int]:
  """Derives the sizes that depend on one another."""
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
      raise _unfit(
        "gradient_accumulation_steps",
        given["gradient_accumulation_steps"],
        f"{name} on {num_devices} devices makes it {needed}",
        str(needed),
      )
    parts = needed
  if parts:
    sizes["batch.per_device"] = rows // (parts * num_devices)
  return sizes


def _offload(config: Any) -> list[str]:  # Any: as in `LaunchRequest`.
  """Lets all wait in the host's memory that the recipe can do without."""
  has_reference = has(config, "loss.kl_coef") and config.loss.kl_coef > 0
  return [
    f"--config.offload.{part}=True"
    for part in config.offload
    if part != "reference" or has_reference
  ]


def _number(name: str, value: str) -> int:
  if not value.isdigit() or not int(value):
    raise _unfit(name, value, "it is a count, and at least 1", None)
  return int(value)


def _divide(name: str, value: str, rows: int, divisor: int) -> int:
  if rows % divisor:
    why = f"{rows} sequences do not divide by {divisor}"
    raise _unfit(name, value, why, None)
  return rows // divisor


def load(
  recipe: str, settings: Sequence[str]
) -> Any:  # Any: as in `LaunchRequest`.
  """Loads a recipe as the training script will."""
  values = flags.FlagValues()
  argv = ["launch", f"--config={recipe}", *settings]
  config_flags.DEFINE_config_file(
    "config", lock_config=True, flag_values=values, sys_argv=argv
  )
  try:
    values(argv)
    return values["config"].value
  except (
    *(flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError),
  ) as error:
    raise errors.ConfigError(
      "The config cannot be used.",
      where=" ".join(argv[1:]),
      # What a recipe raises is told as a traceback, whose last line says it.
      why=str(error).strip().splitlines()[-1],
      fix="See docs/overrides.md, and the recipe for its --config.KEY names.",
    ) from error


def _refused(
  word: str, what: str, name: str, known: Sequence[str]
) -> errors.ConfigError:
  near = difflib.get_close_matches(name, known, n=1)
  return errors.ConfigError(
    what,
    where=word,
    why=f"Known are {', '.join(known)}.",
    fix=f"Did you mean {near[0]}?" if near else "Choose one of these.",
  )


def _unfit(
  name: str, value: str, why: str, better: str | None
) -> errors.ConfigError:
  return errors.ConfigError(
    f"{name}={value} cannot be honoured.",
    where=f"{name}={value}",
    why=f"{why[0].upper()}{why[1:]}.",
    fix=f"Set {name}={better}." if better else "Leave it out, or change it.",
  )


def markdown() -> str:
  """Writes the table as a page."""
  lines = [
    "# Overrides of the launchers",
    "",
    "`scripts/launch.sh` and `scripts/launch_with_server.sh` take any config",
    "value as `--config.KEY=VALUE`, and the original's names as `NAME=VALUE`.",
    "These are all; any other is refused. This page is made by",
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
    "The word `offload`, wherever it stands, sets `--config.offload.*`: the",
    "optimizer's moments and the frozen reference lie in the host's memory,",
    "and are on the devices for as long as a step needs them. Parameters stay",
    "on the devices, and no number changes. Where devices cannot reach the",
    "host's memory it is refused. It has not been run on a GPU or TPU yet.",
  ]
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  print(markdown(), end="")
