# SPDX-License-Identifier: Apache-2.0
"""The flags of a job that runs as several processes, one command line each.

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
  "coordinator_address", None, "HOST:PORT at which process 0 is met."
)
_COUNT = flags.DEFINE_integer("num_processes", None, "How many there are.")
_ID = flags.DEFINE_integer("process_id", None, "Which this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  None,
  "Whether the cluster is asked for these. By default it is if Slurm, Open MPI "
  "or a TPU pod has started several; Kubernetes must be asked.",
)
_WAIT = flags.DEFINE_integer(
  "max_process_wait_s", 300, "What processes may take to come."
)
_SILENCE = flags.DEFINE_integer(
  "max_process_silence_s", 60, "After which a process counts as lost."
)


def run(name: str, module: str, main: Callable[[], None]) -> int:
  """Runs the main of a module, as one of several processes if there are.

  `name` is what messages call it.

  JAX ends such a process by an abort when another is lost. So it runs in a
  child of this one, which stays to tell the cause.

  Returns:
    The exit code.

  Raises:
    errors.AtlasError: if another process is lost, or the flags cannot be used.
  """
  address = _address()
  if address is None and not _is_asked():
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


def _is_asked() -> bool:
  if _DISTRIBUTED.value is None:
    return distributed.is_cluster_job(os.environ)
  return _DISTRIBUTED.value


def _address() -> distributed.Address | None:
  coordinator, count, number = _ADDRESS.value, _COUNT.value, _ID.value
  if coordinator is None and count is None and number is None:
    return None
  if coordinator is None or count is None or number is None:
    raise errors.ConfigError(
      "Only some of what several processes need is told.",
      where="--coordinator_address, --num_processes, --process_id",
      why=f"They are {coordinator}, {count} and {number}.",
      fix="Set all three, or none to run alone or as the cluster tells.",
    )
  return distributed.Address(coordinator, count, number)
