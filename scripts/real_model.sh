#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains a teacher of a real model on real tasks: SmolLM2-135M-Instruct is both
# student and teacher (with LoRA), reasoning-gym asks and grades. SFT of both,
# GRPO of the teacher, evaluation before and after, one page of results:
#   bash scripts/real_model.sh [--minutes=30] [--questions=100] [--seed=0]
#     [--results=results/real_model]
# Training stops after its share of the minutes, on a CPU or on a GPU; set JAX's
# GPU version up first (pip install 'jax[cuda13]'). --questions are those of one
# evaluation; its time is not limited. Run again, it reuses existing results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command="bash scripts/real_model.sh $*"
minutes=30 questions=100 seed=0 results=results/real_model
for argument in "$@"; do
  case "$argument" in
    --minutes=*) minutes="${argument#*=}" ;;
    --questions=*) questions="${argument#*=}" ;;
    --seed=*) seed="${argument#*=}" ;;
    --results=*) results="${argument#*=}" ;;
    *)
      echo "Unknown argument $argument. Valid arguments: --minutes=," \
        "--questions=, --seed=, --results=." >&2
      exit 2
      ;;
  esac
done
world=.cache/real
[[ "$seed" == 0 ]] || world+="-$seed"

source scripts/environment.sh
ensure_environment trainer
ensure_real
python=.venv/bin/python
export HF_HUB_OFFLINE=1

say() { printf '\n== %s\n' "$*"; }

# steps WORKDIR: prints the number of steps of its newest checkpoint.
steps() { find "$1/checkpoints" -mindepth 1 -maxdepth 1 -printf '%f\n' |
  grep -x '[0-9]*' | sort -n | tail -1; }

# train_for PERCENT WORKDIR COMMAND...: trains for this share of the minutes.
# A stopped run has saved its state; run again with the steps that it has done,
# it only exports.
train_for() {
  local seconds=$((minutes * 60 * $1 / 100)) workdir="$2" code=0
  shift 2
  [[ ! -d "$workdir/export" ]] || return 0
  timeout --signal=TERM "$seconds" "$@" --workdir="$workdir" \
    --config.loop.num_steps=1000000 || code=$?
  [[ $code == 124 ]] || return "$code"
  "$@" --workdir="$workdir" --config.loop.num_steps="$(steps "$workdir")"
}

# One schedule for any number of steps.
common=(--config.seed="$seed" --config.world.directory=
  --config.schedule.schedule=constant --config.schedule.warmup_fraction=0.0
  --config.loop.log_every=1 --config.loop.eval_every=0
  --config.loop.save_every=1000000 --config.packing.length=256)
sft=("$python" -m scripts.train_sft --config=configs/run/teacher_sft.py:smoke
  "${common[@]}" --config.model.path="$world/model" --config.num_epochs=0
  --config.held_out.fraction=0.01 --config.batch.size=2)
lora=(--config.lora.rank=16)
roles=(--config.student.path="$results/student/export")
for limit in probe=8 baseline=16 teach=24 solve=16; do
  roles+=("--config.sampling.${limit%=*}.max_completion_tokens=${limit#*=}")
done

say "1/6 Model and tasks ($world)"
"$python" -m scripts.make_real --directory="$world" --seed="$seed"

say "2/6 SFT of the student, on solutions and teachings"
train_for 25 "$results/student" "${sft[@]}" \
  --config.data.path="$world/student_sft.jsonl" \
  --config.schedule.learning_rate=1e-4

say "3/6 SFT of the teacher with LoRA, on teachings of mixed quality"
train_for 15 "$results/teacher" "${sft[@]}" "${lora[@]}" \
  --config.data.path="$world/teacher_sft.jsonl" \
  --config.schedule.learning_rate=5e-4

say "4/6 GRPO of the teacher with LoRA, rewarded by its student's answers"
train_for 60 "$results/grpo" "$python" -m scripts.train_grpo \
  --config=configs/run/teacher_rcl.py:smoke "${common[@]}" "${lora[@]}" \
  "${roles[@]}" --config.model.path="$results/teacher/export" \
  --config.data.path="$world/questions.jsonl" --config.held_out.path= \
  --config.schedule.learning_rate=5e-4 --config.reference.sync_every=0 \
  --config.batch.num_questions=4 --config.batch.per_device=4 \
  --config.sampling.teach.group_size=8 --config.sampling.baseline.group_size=2

for stage in teacher grpo; do
  say "5/6 Evaluation of $stage"
  [[ -f "$results/eval_$stage/summary.json" ]] ||
    "$python" -m scripts.evaluate \
      --config=configs/run/teaching_eval.py:smoke \
      --workdir="$results/eval_$stage" --config.seed="$seed" \
      --config.world.directory= "${roles[@]}" \
      --config.model.path="$results/$stage/export" \
      --config.data.path="$world/test.jsonl" \
      --config.data.max_rows="$questions" >/dev/null
done

say "6/6 Results"
table=$("$python" -m scripts.report --before="$results/eval_teacher" \
  --after="$results/eval_grpo" --metrics="$results/grpo" \
  --plot="$results/training.png")
device=$("$python" -c 'import jax; print(jax.devices()[0].device_kind)')
cpu=$(grep -m1 '^model name' /proc/cpuinfo | cut -d: -f2-)
cat >"$results/README.md" <<END
\`$command\` at commit $(git rev-parse --short HEAD), on $device,
with $(nproc) cores of$cpu. Steps: SFT of the student
$(steps "$results/student"), of the teacher $(steps "$results/teacher"), GRPO $(steps "$results/grpo").
Held-out questions: $questions, seed $seed.

$table
END
cat "$results/README.md"
"$python" - "$results/eval_grpo/summary.json" <<'END'
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
  share = json.load(file)["all"]["teaching/baseline_accuracy"]
if not 0.3 <= share <= 0.7:
  print(
    f"The student alone is right in a share of {share:.2f}. Between 0.3 and "
    "0.7, a teaching can change most answers; --minutes trains it for longer."
  )
END
