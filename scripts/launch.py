# SPDX-License-Identifier: Apache-2.0
"""Launches training, alone or with rollout servers next to it.

  bash scripts/launch.sh NUM_DEVICES RECIPE [OVERRIDES]
  bash scripts/launch_with_server.sh NUM_SERVERS NUM_DEVICES RECIPE [OVERRIDES]

RECIPE is a file of configs/run, with or without its folder and its ending;
OVERRIDES are --config.KEY=VALUE and the names of docs/overrides.md. With
servers also --rollout=vllm|jax (vLLM where it is installed) and
--max_wait_s=SECONDS (600) for the servers to become healthy.
"""

from collections.abc import Sequence
import logging as stdlib_logging
import os
import pathlib
import sys

from absl import flags, logging

from atlas_jax import errors
from rollout import launcher, placement
from scripts import overrides

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_OPTIONS = {"--num_servers": "0", "--rollout": "", "--max_wait_s": "600"}
_HOST, _PORT = "127.0.0.1", 8765


def main(argv: Sequence[str]) -> int:
  """Launches; returns the exit code."""
  try:
    return _launch(argv)
  except errors.AtlasError as error:
    print(f"\n{error}", file=sys.stderr)
    return int(error.exit_code)


def _launch(argv: Sequence[str]) -> int:
  options, (number, recipe, *words) = _parse(argv)
  num_servers, num_devices = int(options["--num_servers"]), int(number)
  job = overrides.resolve(
    overrides.find_recipe(recipe), words, num_devices=num_devices
  )
  devices = placement.split(
    placement.find_gpus(os.environ),
    num_servers,
    num_devices,
    xla_flags=os.environ.get("XLA_FLAGS", ""),
  )
  settings = [f"--config={job.recipe}", *job.settings]
  if not any(word.startswith("--config.mesh.") for word in words):
    mesh = placement.mesh(num_devices)
    settings += [f"--config.mesh.{k}={v}" for k, v in mesh.items()]
  servers = []
  if num_servers:
    servers = _servers(job, options["--rollout"], devices)
  if num_servers or job.host or job.port:
    settings += _addresses(job, servers)
  if servers and job.config.world.directory:
    world = launcher.Command("The small world", _world(job), {}, None, 10.0)
    if code := launcher.run([], world, max_wait_s=0.0):
      return code
  module = "train_grpo" if "reward" in job.config else "train_sft"
  command = (sys.executable, "-m", f"scripts.{module}", *settings)
  training = launcher.Command(
    "Training",
    (*command, f"--workdir={job.workdir}"),
    devices.training,
    None,
    launcher.TRAINING_GRACE_S,
  )
  logging.info("Training: %s", " ".join(training.argv))
  return launcher.run(
    servers, training, max_wait_s=float(options["--max_wait_s"])
  )


def _parse(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
  """Splits what the launcher itself reads from the recipe and the rest."""
  options, rest = dict(_OPTIONS), []
  for word in argv:
    name, equals, value = word.partition("=")
    if equals and name in options:
      options[name] = value
    else:
      rest.append(word)
  counts = (options["--num_servers"], rest[0] if rest else "")
  usable = all(count.isdigit() for count in counts) and int(counts[1] or 0) > 0
  if len(rest) < 2 or not usable:
    raise errors.ConfigError(
      "The launcher was called with other arguments than it takes.",
      where=" ".join(argv),
      why="It takes the number of devices, a recipe, and overrides.",
      fix="For example: bash scripts/launch_with_server.sh 1 1 "
      "configs/run/teacher_rcl.py:smoke max_steps=4",
    )
  return options, rest


def _world(job: overrides.Job) -> tuple[str, ...]:
  """Makes what is missing of the small world; servers open its models."""
  world = job.config.world
  options = (
    f"--directory={world.directory}",
    f"--teacher={world.with_teacher}",
  )
  return (sys.executable, "-m", "scripts.make_world", *options)


def _servers(
  job: overrides.Job, wanted: str, devices: placement.Split
) -> list[launcher.Server]:
  """Plans the servers of a job; refuses ports that are taken."""
  if "rollout" not in job.config:
    raise errors.ConfigError(
      "This recipe samples nothing.",
      where=job.recipe,
      why="It has no section `rollout` that could use servers.",
      fix="Run it by scripts/launch.sh.",
    )
  engine, python = placement.find_engine(_ROOT, wanted)
  site = placement.Site(
    host=job.host or _HOST,
    port=job.port or _PORT,
    engine=engine,
    python=python,
    models={
      "policy": job.config.model.path,
      "student": job.config.student.path,
    },
    dtype=job.config.rollout.dtype,
    logs=job.workdir / "servers",
  )
  launcher.check_ports(site.host, site.port, len(devices.servers))
  return placement.plan(site, devices)


def _addresses(
  job: overrides.Job, servers: Sequence[launcher.Server]
) -> list[str]:
  """Tells training where the servers of each role are."""
  host, port = job.host or _HOST, job.port or _PORT
  urls = {
    "policy": [s.url for s in servers if s.role == "policy"],
    "student": [s.url for s in servers if s.role == "student"],
  }
  if not servers:  # They run already: the two that a launcher would start.
    urls = {"policy": [f"http://{host}:{port}"]}
    urls["student"] = [f"http://{host}:{port + 1}"]
  return ["--config.rollout.backend=http"] + [
    f"--config.rollout.{role}_urls={tuple(addresses)!r}"
    for role, addresses in urls.items()
  ]


if __name__ == "__main__":
  flags.FLAGS(sys.argv[:1])  # Until then absl warns of each message.
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  stdlib_logging.getLogger("httpx2").setLevel(stdlib_logging.WARNING)
  sys.exit(main(sys.argv[1:]))
