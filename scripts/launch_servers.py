# SPDX-License-Identifier: Apache-2.0
"""Plans the rollout servers of a job, and the flags for their URLs."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import os
import pathlib

from atlas_jax import errors
from rollout import addresses, placement, supervisor, tokens, wire
from scripts import launch_overrides

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_HOST, _PORT = "127.0.0.1", 8765


def served_models(job: launch_overrides.LaunchRequest) -> dict[wire.Role, str]:
  """Returns the path of the model that is served in each role."""
  models: dict[wire.Role, str] = {"policy": job.config.model.path}
  if "student" in job.config:
    models["student"] = job.config.student.path
  return models


def plan(
  job: launch_overrides.LaunchRequest, wanted: str, devices: placement.Split
) -> list[supervisor.Server]:
  """Plans the servers of a job.

  Args:
    job: the recipe and its overrides.
    wanted: the engine, or "" for the default of the installation.
    devices: from `placement.split`.

  Raises:
    errors.ConfigError: if the recipe does not use servers, the engine is not
      installed, or a port is taken.
  """
  if job.config.recipe == "sft":
    raise errors.ConfigError(
      "This recipe does not sample.",
      where=job.recipe,
      why="It has no section `rollout`, so it would not use the servers.",
      fix="Run it with scripts/launch.sh.",
    )
  engine, python = placement.find_engine(_ROOT, wanted)
  site = placement.Site(
    host=job.host or _HOST,
    port=job.port or _PORT,
    engine=engine,
    python=python,
    models=served_models(job),
    dtype=job.config.rollout.dtype,
    logs=job.workdir / "servers",
  )
  supervisor.check_ports(site.host, site.port, len(devices.servers))
  return placement.plan(site, devices)


def training_flags(
  job: launch_overrides.LaunchRequest, servers: Sequence[supervisor.Server]
) -> list[str]:
  """Returns the training flags with the server URLs of each role.

  Without `servers`, they are assumed to run already, at the default ports.
  """
  host, port = job.host or _HOST, job.port or _PORT
  urls = {
    role: [s.url for s in servers if s.role == role]
    for role in served_models(job)
  }
  if not servers:
    urls = {
      role: [addresses.url(host, port + i)] for i, role in enumerate(urls)
    }
  return ["--config.rollout.backend=http"] + [
    f"--config.rollout.{role}_urls={tuple(of_role)!r}"
    for role, of_role in urls.items()
  ]


@contextlib.contextmanager
def share_token(
  servers: Sequence[supervisor.Server],
  training: supervisor.Command,
  directory: pathlib.Path,
) -> Iterator[tuple[list[supervisor.Server], supervisor.Command]]:
  """Gives servers and training a new token, unless the environment has one.

  Only the path of its file is passed on: command lines are visible to all users
  of the machine.

  Args:
    servers: planned servers; may be empty.
    training: the command that samples from them.
    directory: of the token's file, which is removed on exit.

  Yields:
    The servers and the command, with the path in their environment.
  """
  if not servers or tokens.of_environment(os.environ):
    yield list(servers), training
    return
  with tokens.new_file(directory) as path:

    def with_path(command: supervisor.Command) -> supervisor.Command:
      env = {**command.env, tokens.FILE_VARIABLE: str(path.resolve())}
      return dataclasses.replace(command, env=env)

    yield (
      [dataclasses.replace(s, command=with_path(s.command)) for s in servers],
      with_path(training),
    )
