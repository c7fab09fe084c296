# SPDX-License-Identifier: Apache-2.0
"""Which servers a job needs, and how its training finds them."""

from collections.abc import Sequence
import pathlib

from atlas_jax import errors
from rollout import placement, supervisor, wire
from scripts import launch_overrides

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_HOST, _PORT = "127.0.0.1", 8765


def models(job: launch_overrides.LaunchRequest) -> dict[wire.Role, str]:
  """Tells what is served in each role."""
  models: dict[wire.Role, str] = {"policy": job.config.model.path}
  if "student" in job.config:
    models["student"] = job.config.student.path
  return models


def plan(
  job: launch_overrides.LaunchRequest, wanted: str, devices: placement.Split
) -> list[supervisor.Server]:
  """Plans the servers of a job.

  Args:
    job: what is trained.
    wanted: the engine, or "" for what is installed.
    devices: as `placement.split` gives them.

  Raises:
    errors.ConfigError: if it has no use for servers, the engine is not
      installed, or a port is taken.
  """
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
    models=models(job),
    dtype=job.config.rollout.dtype,
    logs=job.workdir / "servers",
  )
  supervisor.check_ports(site.host, site.port, len(devices.servers))
  return placement.plan(site, devices)


def addresses(
  job: launch_overrides.LaunchRequest, servers: Sequence[supervisor.Server]
) -> list[str]:
  """Tells training where the servers of each role are."""
  host, port = job.host or _HOST, job.port or _PORT
  urls = {
    role: [s.url for s in servers if s.role == role] for role in models(job)
  }
  if not servers:  # They run already: those that a launcher would start.
    urls = {role: [f"http://{host}:{port + i}"] for i, role in enumerate(urls)}
  return ["--config.rollout.backend=http"] + [
    f"--config.rollout.{role}_urls={tuple(of_role)!r}"
    for role, of_role in urls.items()
  ]
