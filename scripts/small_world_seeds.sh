#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the quickstart with three seeds and writes docs/results/small_world.md.
#   bash scripts/small_world_seeds.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

runs=(results/quickstart results/quickstart-1 results/quickstart-2)
for seed in 0 1 2; do
  bash scripts/quickstart.sh --seed="$seed"
done

# list SUFFIX: prints the directories of all runs, separated by commas.
list() { local IFS=,; echo "${runs[*]/%//$1}"; }

out=docs/results/small_world.md
mkdir -p docs/results
table=$(.venv/bin/python -m scripts.report --before="$(list eval_sft)" \
  --after="$(list eval_grpo)" --metrics="$(list grpo)" \
  --plot=docs/results/small_world.png)
cpu=$(grep -m1 '^model name' /proc/cpuinfo | cut -d: -f2-)
cat >"$out" <<END
# Small world: results of three seeds

The quickstart's results with three seeds, measured by
\`bash scripts/small_world_seeds.sh\` at commit
$(git rev-parse --short HEAD), on $(nproc) cores of$cpu; no accelerator.

Each seed has its own problems, student and teacher. There are 400 held-out
problems; the teacher writes one teaching at temperature 1.0, the student one
answer at 0.7, with the same random numbers for both teachers of a seed. Intervals
of shares are Wilson's; the difference is a paired bootstrap. \`leaks\` is the
share of teachings that contain the answer, \`no tag\` the share of completions
without a teaching, \`tokens\` the mean length of a teaching, TES the gain in
accuracy per thousand of them.

$table

![Reward and accuracy over the steps of GRPO](small_world.png)
END
echo "Wrote $out"
