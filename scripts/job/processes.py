# SPDX-License-Identifier: Apache-2.0
"""Flags for multi-process jobs; each process is started by its own command.

  python -m scripts.train_sft ... --coordinator_address=HOST:PORT \
    --num_processes=2 --process_id=0

Under Slurm, Open MPI and on TPU pods no flag is needed.
"""

from collections.abc import Callable
import os
import sys

from absl import flags

from atlas_jax import distributed, errors
from rollout import supervisor

_ADDRESS = flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT on which process 0 listens."
)
_COUNT = flags.DEFINE_integer("num_processes", None, "Number of processes.")
_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  None,
  "Whether to read the three values above from the cluster environment. By "
  "default true if Slurm, Open MPI or a TPU pod started several processes; "
  "on Kubernetes it must be set.",
)
_WAIT = flags.DEFINE_integer(
  "max_process_wait_s", 300, "Seconds to wait for all processes to connect."
)
_SILENCE = flags.DEFINE_integer(
  "max_process_silence_s",
  60,
  "Seconds without a heartbeat after which a process counts as lost.",
)


def run(name: str, module: str, main: Callable[[], None]) -> int:
  """Runs the main of a module, as one of several processes if configured.

  When a process is lost, JAX aborts the others. So each runs in a child of
  this process, which stays alive to report the cause.

  Args:
    name: of the job, for messages.
    module: its full name, for `python -m` in the child.
    main: runs the job.

  Returns:
    The exit code.

  Raises:
    errors.AtlasError: if another process is lost, or the flags are invalid.
  """
  address = _address()
  if address is None and not _is_distributed():
    main()
    return errors.Exit.DONE
  if supervisor.is_guarded():
    distributed.initialize(
      address, max_wait_s=_WAIT.value, max_silence_s=_SILENCE.value
    )
    with distributed.together():
      main()
    return errors.Exit.DONE
  command = supervisor.Command(
    name,
    (sys.executable, "-m", module, *sys.argv[1:]),
    {},
    None,
    supervisor.TRAINING_GRACE_S,
  )
  return supervisor.run([], command, max_wait_s=0.0)


def _is_distributed() -> bool:
  if _DISTRIBUTED.value is None:
    return distributed.is_cluster_job(os.environ)
  return _DISTRIBUTED.value


def _address() -> distributed.Address | None:
  coordinator, count, number = _ADDRESS.value, _COUNT.value, _ID.value
  if coordinator is None and count is None and number is None:
    return None
  if coordinator is None or count is None or number is None:
    raise errors.ConfigError(
      "Multi-process flags must be set together, or not at all.",
      where="--coordinator_address, --num_processes, --process_id",
      why=f"They are {coordinator}, {count} and {number}.",
      fix="Set all three, or none to run one process or to use the cluster's "
      "values.",
    )
  return distributed.Address(coordinator, count, number)
