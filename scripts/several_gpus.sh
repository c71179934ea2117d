#!/usr/bin/env bash
# Measure both phases on the GPUs of one machine, in less than ten minutes; no network is needed.
#
#     scripts/several_gpus.sh 2 results       # every row of docs/performance.md on two GPUs
#     scripts/several_gpus.sh 4 results       # 128K, 512K and 1M on meshes 4x1, 2x2 and 1x4
#
# Writes JSON and pictures into folders of RESULTS, row by row: what is measured stays if the time
# runs out. MODEL=... measures a model in place of random weights.
set -uo pipefail
gpus=${1:?usage: several_gpus.sh GPUS RESULTS}
results=${2:?usage: several_gpus.sh GPUS RESULTS}
model=(--shapes llama-3.1-8b)
[ -n "${MODEL:-}" ] && model=(--model "$MODEL")
python=${PYTHON:-python3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

bench() {
  "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" \
    -m star_attention bench "$1" "${model[@]}" "${@:2}" || echo "bench $*: failed" >&2
}

if [ "$gpus" -le 2 ]; then
  bench ranks --compile --context 16k,128k --prefill-context 128k --prefill-block 16k,8k \
    --budget "${BUDGET:-360}" --out "$results/ranks"
else
  long=(--context 128k,512k,1m --prefill-context 128k,512k,1m --repeats 1 --compile)
  bench ranks "${long[@]}" --prefill-block 32k,16k --ring-up-to 512k --meshes "${gpus}x1" \
    --budget "${BUDGET:-330}" --out "$results/ranks"
  bench ranks "${long[@]}" --prefill-block 16k --meshes "$((gpus / 2))x2,1x$gpus" \
    --parts decode,prefill --budget "${MESH_BUDGET:-130}" --out "$results/meshes"
fi
[ "${STARTUP:-1}" = 1 ] && bench startup --out "$results/startup"
exit 0
