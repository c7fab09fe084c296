# SPDX-License-Identifier: Apache-2.0
"""Resolves the launchers' `NAME=VALUE` overrides into config values.

The names are those of `override_names.TABLE`, from which `docs/overrides.md` is
generated:

  python -m scripts.launch_overrides > docs/overrides.md
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import pathlib

from absl import flags
from ml_collections import config_flags

from atlas_jax import errors, types
from scripts import override_names, program
from scripts.job import config_keys

_RECIPES = pathlib.Path("configs/run")
_NONE = ("null", "none", "[]")
_OFFLOAD, _ZERO1 = "offload", "zero1"  # The original's words for DeepSpeed.
_STRATEGIES = ("save_strategy", "eval_strategy")


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
    near = difflib.get_close_matches(path.stem, known, n=1)
    raise errors.ConfigError(
      "Unknown recipe.",
      where=name,
      why=f"configs/run has {', '.join(known)}.",
      fix=f"Did you mean {near[0]}?" if near else "Choose one of these.",
    )
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
      origins[path_of(word)] = "flag"
      continue
    if not equals or name not in override_names.TABLE:
      raise _unknown_override(word, base)
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
  paths = (
    ("loop.num_steps",)
    if name == "max_steps"
    else override_names.TABLE[name].paths
  )
  present = [path for path in paths if has(base, path)]
  if paths and not present:
    raise _invalid(name, value, "this recipe does not have this setting", None)
  if paths and value.lower() in _NONE:
    raise _invalid(name, value, "it needs a value", None)
  row = override_names.TABLE[name]
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
    config: types.Config = values["config"].value
    config.lock()  # Raises if the file was not found.
    return config
  except program.INVALID as error:
    raise errors.ConfigError(
      "Invalid recipe or config value.",
      where=" ".join(argv[1:]),
      # If a recipe raises, this is a traceback that ends with the message.
      why=str(error).strip().splitlines()[-1],
      fix=_advice(recipe, settings),
    ) from error


def _advice(recipe: str, settings: Sequence[str]) -> str:
  """Returns the keys that unknown ones in `settings` may stand for."""
  advice = ""
  if settings:
    keys = [key for key, _ in config_keys.values(load(recipe, []))]
    advice = override_names.advice(settings, keys, ())
  return advice or "See docs/config.md for the --config.KEY of each recipe."


def _unknown_override(word: str, base: types.Config) -> errors.ConfigError:
  name, known = word.partition("=")[0], list(override_names.TABLE)
  if near := difflib.get_close_matches(name, known, n=1):
    fix = f"Did you mean {near[0]}?"
  else:
    keys = [key for key, _ in config_keys.values(base)]
    fix = override_names.advice([f"--{name.lstrip('-')}"], keys, ())
  return errors.ConfigError(
    "Unknown override.",
    where=word,
    why=f"Valid names are {', '.join(known)}.",
    fix=fix or "Choose one of these, or --config.KEY=VALUE.",
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
  for name, row in override_names.TABLE.items():
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
