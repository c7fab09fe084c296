# SPDX-License-Identifier: Apache-2.0
"""How XLA compiles where tests wait for that longer than for the results.

Without the newer code generator of fusions, and in one piece, a program takes
half the time to compile. It computes the same, to rounding.
"""

NO_FUSION_EMITTERS = (
  "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
XLA_FLAGS = f"--xla_backend_optimization_level=0 {NO_FUSION_EMITTERS}"
