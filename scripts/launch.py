# SPDX-License-Identifier: Apache-2.0
"""Launches training, optionally with rollout servers on the same machine.

  bash scripts/launch.sh NUM_DEVICES RECIPE [OVERRIDES] [offload]
  bash scripts/launch_with_server.sh NUM_SERVERS NUM_DEVICES RECIPE \
    [OVERRIDES] [offload]

RECIPE is a file of configs/run; its folder and suffix are optional. OVERRIDES
are --config.KEY=VALUE and the names of docs/overrides.md. With servers,
--rollout=vllm|jax selects the engine (default: vLLM if installed), and
--max_wait_s=SECONDS (600) limits the wait for healthy servers. --print_config
prints the resulting config with the origin of each value, and exits.
"""

from collections.abc import Sequence
import logging as stdlib_logging
import os
import sys

from absl import flags, logging

from atlas_jax import errors
from rollout import placement, supervisor
from scripts import launch_overrides, launch_servers, override_names, program
from scripts.job import print_config, recipes

_PRINT_CONFIG = "--print_config"
_OPTIONS = {
  "--num_servers": "0",
  "--rollout": "",
  "--max_wait_s": "600",
  _PRINT_CONFIG: "",
}
# Names that `--help` lists; docs/overrides.md has all of them.
_USUAL = (
  "output_dir",
  "model_name_or_path",
  "student_model",
  "dataset_id_or_path",
  "max_steps",
  "learning_rate",
  "train_batch_size",
  "per_device_train_batch_size",
  "num_generations",
  "max_completion_length",
)


def main(argv: Sequence[str]) -> int:
  """Launches training; returns the exit code."""
  # launch_with_server.sh passes its first argument as the number of servers.
  if program.is_help([word.removeprefix("--num_servers=") for word in argv]):
    return _print_help()
  try:
    return _launch(argv)
  except errors.AtlasError as error:
    print(f"\n{error}", file=sys.stderr)
    return int(error.exit_code)


def _print_help() -> int:
  print(f"{program.with_line_breaks(__doc__ or '')}\n\nUsual overrides:")
  for name in _USUAL:
    print(f"  {name}=VALUE\n      {override_names.TABLE[name].meaning}")
  print("\nFor example: bash scripts/launch.sh 1 teacher_sft:smoke max_steps=4")
  return int(errors.Exit.DONE)


def _launch(argv: Sequence[str]) -> int:
  options, (number, recipe, *words) = _parse(argv)
  num_servers, num_devices = int(options["--num_servers"]), int(number)
  job = launch_overrides.resolve(
    launch_overrides.find_recipe(recipe), words, num_devices=num_devices
  )
  if options[_PRINT_CONFIG]:
    return _print_config(job, words, num_devices)
  devices = placement.split(
    placement.find_gpus(os.environ),
    num_servers,
    num_devices,
    num_roles=len(launch_servers.served_models(job)),
    xla_flags=os.environ.get("XLA_FLAGS", ""),
  )
  settings = [f"--config={job.recipe}", *job.settings]
  settings += _mesh(words, num_devices)
  servers = []
  if num_servers:
    servers = launch_servers.plan(job, options["--rollout"], devices)
  if servers or job.host or job.port:
    settings += launch_servers.training_flags(job, servers)
  if servers and job.config.world.directory:
    world = supervisor.Command("The small world", _world(job), {}, None, 10.0)
    if code := supervisor.run([], world, max_wait_s=0.0):
      return code
  program = recipes.PROGRAMS[job.config.recipe]
  command = (sys.executable, "-m", program, *settings)
  training = supervisor.Command(
    "Training",
    (*command, f"--workdir={job.workdir}"),
    devices.training,
    None,
    supervisor.TRAINING_GRACE_S,
  )
  logging.info("Training: %s", " ".join(training.argv))
  with launch_servers.share_token(
    servers, training, job.workdir / "servers"
  ) as (servers, training):
    return supervisor.run(
      servers, training, max_wait_s=float(options["--max_wait_s"])
    )


def _mesh(words: Sequence[str], num_devices: int) -> list[str]:
  """Returns flags for the default mesh, or none if `words` set the mesh."""
  if any(word.startswith("--config.mesh.") for word in words):
    return []
  mesh = placement.mesh(num_devices)
  return [f"--config.mesh.{k}={v}" for k, v in mesh.items()]


def _print_config(
  job: launch_overrides.LaunchRequest, words: Sequence[str], num_devices: int
) -> int:
  """Prints the config of a job; server addresses are not known yet."""
  settings = [*job.settings, *_mesh(words, num_devices)]
  given = dict.fromkeys(map(launch_overrides.path_of, settings), "launcher")
  config = launch_overrides.load(job.recipe, settings)
  print(print_config.table(job.recipe, config, {**given, **job.origins}))
  return int(errors.Exit.DONE)


def _parse(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
  """Splits the launcher's own options from the recipe and its overrides."""
  options, rest = dict(_OPTIONS), []
  for word in argv:
    name, equals, value = word.partition("=")
    if word == _PRINT_CONFIG:
      options[word] = "yes"
    elif equals and name in options:
      options[name] = value
    else:
      rest.append(word)
  counts = [options["--num_servers"], options["--max_wait_s"], *rest[:1]]
  usable = len(rest) > 1 and all(count.isdigit() for count in counts)
  if not usable or not int(rest[0]):
    raise errors.ConfigError(
      "Invalid launcher arguments.",
      where=" ".join(argv),
      why="They must be the number of devices, a recipe, and overrides.",
      fix="For example: bash scripts/launch_with_server.sh 1 1 "
      "configs/run/teacher_rcl.py:smoke max_steps=4",
    )
  return options, rest


def _world(job: launch_overrides.LaunchRequest) -> tuple[str, ...]:
  """Returns the command that creates missing models and data for servers."""
  options = (f"--directory={job.config.world.directory}", "--notrain")
  return (sys.executable, "-m", "scripts.make_world", *options)


if __name__ == "__main__":
  flags.FLAGS(sys.argv[:1])  # Unparsed flags make absl warn at the first log.
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().setFormatter(program.LOG_FORMAT)
  stdlib_logging.getLogger("httpx2").setLevel(stdlib_logging.WARNING)
  program.leave(lambda: main(sys.argv[1:]))
