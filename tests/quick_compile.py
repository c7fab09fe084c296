# SPDX-License-Identifier: Apache-2.0
"""XLA flags that reduce compile time, which dominates the tests.

Without fusion emitters and parallel code generation, programs compile in half
the time. Results are equal up to rounding.
"""

import jax

_SERIAL_CODEGEN = "--xla_cpu_parallel_codegen_split_count=1"
# Removed from XLA after the last jax for Python 3.11; unknown flags abort.
_NO_FUSION_EMITTERS = (
  "--xla_cpu_use_fusion_emitters=false "
  if jax.__version_info__ < (0, 11)
  else ""
)
# A collective of the simulated devices aborts the process if some of their
# threads have not joined it within 40 s, which happens on a busy machine.
_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=120"
XLA_FLAGS = (
  "--xla_backend_optimization_level=0 "
  f"{_NO_FUSION_EMITTERS}{_SERIAL_CODEGEN} {_PATIENCE}"
)
