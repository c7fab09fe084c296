#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains a teacher from scratch on a CPU: a small world of word problems, SFT,
# GRPO, evaluation of both teachers, one table. Run again, it reuses existing
# results. Each seed has its own world and its own results:
#   bash scripts/quickstart.sh [--seed=0] [--steps=60] [--epochs=N]
#     [--rollout=vllm|jax]
# --epochs shortens every SFT, for a quick test of the pipeline. With --rollout,
# GRPO samples from servers, which run vLLM or the JAX sampler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seed=0 steps=60 epochs=() rollout=""
for argument in "$@"; do
  case "$argument" in
    --seed=*) seed="${argument#*=}" ;;
    --epochs=*) epochs=("${argument#*=}") ;;
    --steps=*) steps="${argument#*=}" ;;
    --rollout=vllm | --rollout=jax) rollout="${argument#*=}" ;;
    *)
      echo "Unknown argument $argument. Valid arguments: --seed=," \
        "--epochs= (of SFT), --steps= (of GRPO), --rollout=vllm or =jax." >&2
      exit 2
      ;;
  esac
done
world=".cache/world" results="results/quickstart"
if [[ "$seed" != 0 ]]; then
  world+="-$seed" results+="-$seed"
fi

source scripts/environment.sh
ensure_environment trainer
python=.venv/bin/python
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" HF_HUB_OFFLINE=1
# The stages share many programs that compile in less than the default second.
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

say() { printf '\n== %s\n' "$*"; }

say "1/6 The small world: problems, tokenizer, student ($world)"
[[ -f "$world/world.json" ]] ||
  "$python" -m scripts.make_world --directory="$world" --seed="$seed" \
    "${epochs[@]/#/--epochs=}"

say "2/6 SFT warm-up of the teacher, on teachings of mixed quality"
[[ -d "$results/sft/export" ]] ||
  "$python" -m scripts.train_sft \
    --config=configs/run/teacher_sft.py:smoke --workdir="$results/sft" \
    --config.seed="$seed" --config.world.directory= \
    --config.model.path="$world/teacher_init" "${epochs[@]/#/--config.num_epochs=}" \
    --config.data.path="$world/teacher_sft.jsonl"

common=(
  --config.world.directory="" --config.student.path="$world/student_run/export"
)
say "3/6 GRPO of the teacher, rewarded by its student's answers"
grpo=("$python" -m scripts.train_grpo --workdir="$results/grpo"
  --config=configs/run/teacher_rcl.py:smoke)
if [[ -n "$rollout" ]]; then
  [[ "$rollout" != vllm ]] || bash scripts/install_rollout.sh
  grpo=(bash scripts/launch_with_server.sh 1 1 configs/run/teacher_rcl.py:smoke
    --rollout="$rollout" output_dir="$results/grpo")
fi
[[ -d "$results/grpo/export" ]] ||
  "${grpo[@]}" \
    --config.seed="$seed" --config.loop.num_steps="$steps" "${common[@]}" \
    --config.model.path="$results/sft/export" \
    --config.data.path="$world/questions.jsonl" \
    --config.held_out.path="$world/validation.jsonl"

for stage in sft grpo; do
  say "$([[ $stage == sft ]] && echo 4 || echo 5)/6 Evaluation after $stage"
  [[ -f "$results/eval_$stage/summary.json" ]] ||
    "$python" -m scripts.evaluate \
      --config=configs/run/teaching_eval.py:smoke \
      --workdir="$results/eval_$stage" "${common[@]}" \
      --config.model.path="$results/$stage/export" \
      --config.data.path="$world/test.jsonl" >/dev/null
done

say "6/6 Results"
"$python" -m scripts.report --before="$results/eval_sft" \
  --after="$results/eval_grpo" --metrics="$results/grpo" \
  --plot="$results/training.png"
cat <<END

The teacher, as a Hugging Face model: $results/grpo/export
Held-out questions and answers:       $results/eval_grpo/records.jsonl
Metrics of each step:                 $results/grpo/metrics.jsonl
END
