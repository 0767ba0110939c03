#!/usr/bin/env bash
# The fast engine's runs beside the reference's in the README, on a CPU: bash benchmarks/engines.sh TREES [RESULTS]
# TREES/1000 is a CIFAR-10 image tree: the first 1000 training images of each class, all test images.
# The reference's runs are the recipe digits (make train) and small_runs.sh. An hour on one core.
# RESULTS gets the JSON files: benchmarks/measured/cpu, which git ignores, or for new pages benchmarks/results.
set -euo pipefail
trees=$(realpath "$1")
results=$(realpath -m "${2:-$(dirname "$0")/measured/cpu}")
cd "$(dirname "$0")/.."
mkdir -p "$results"
export OMP_NUM_THREADS=${THREADS:-1}
python=.venv/bin/python

$python -m fastafd.train --recipe digits --engine fast --out runs/digits-fast
$python -m fastafd.train --engine fast --out runs/resnet8-fast --dataset cifar10 --data-dir "$trees/1000" \
    --arch resnet8 --batch-size 64 --epochs 8 --pretrain.epochs 15 --pretrain.batch-size 64 \
    --attack.steps 5 --attack.step-size 2/255 --eval-n 2000 --autoattack-n 100 --log-every 39 --save-every 78
cp runs/digits-fast/result.json "$results/digits-fast.json"
cp runs/resnet8-fast/result.json "$results/small-resnet8-fast.json"

# How far natural models of one recipe lie apart, whatever the engine: five seeds each.
for engine in reference fast; do
    for seed in 0 1 2 3 4; do
        out=runs/natural-$engine-$seed
        $python -m fastafd.pretrain --arch resnet8_half --dataset digits --epochs 8 --batch-size 64 --lr 0.1 \
            --seed $seed --engine $engine --out "$out"
        $python -m fastafd.evaluate "$out" --dataset digits --attack pgd20
    done
done
$python -m benchmarks.table natural runs >"$results/natural-seeds.json"
echo "all of it in $results"
