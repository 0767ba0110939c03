#!/usr/bin/env bash
# The small runs of the README, on a CPU: bash benchmarks/small_runs.sh TREES [RESULTS]
# TREES/1000 and TREES/640 are CIFAR-10 image trees: the first 1000 (640) training images of each class, all test images.
# Each run takes one core half an hour to an hour; the two halves can share a machine (THREADS=1).
# RESULTS gets the JSON files: benchmarks/measured/cpu, which git ignores, or for new pages benchmarks/results.
set -euo pipefail
trees=$(realpath "$1")
results=$(realpath -m "${2:-$(dirname "$0")/measured/cpu}")
cd "$(dirname "$0")/.."
mkdir -p "$results"
export OMP_NUM_THREADS=${THREADS:-1}
run=".venv/bin/python -m fastafd.train --dataset cifar10 --batch-size 64 --attack.steps 5 --attack.step-size 2/255"
off="--alpha 0 --beta 0 --gamma 0 --classifier-alpha 0" # neither disentanglement nor alignment

# ResNet-8 on 10,000 images: natural pre-training, then AFD, then the same with its terms off.
small="--data-dir $trees/1000 --arch resnet8 --epochs 8 --pretrain.epochs 15 --pretrain.batch-size 64"
small="$small --eval-n 2000 --autoattack-n 100 --log-every 39 --save-every 78"
$run $small --out runs/resnet8-afd
$run $small $off --out runs/resnet8-off

# The ResNet-18 that pyautoattack ships, one pass over 6,400 images: 100 steps of 64.
shipped="--data-dir $trees/640 --arch resnet18 --pretrained example --epochs 1"
shipped="$shipped --eval-n 300 --autoattack-n 0 --log-every 10 --save-every 20"
$run $shipped --out runs/resnet18-afd
$run $shipped $off --out runs/resnet18-off

# That ResNet-18 as it is, on 1,000 images.
example=$(.venv/bin/python -c 'from fastafd.training.natural import example_weights; print(example_weights())')
.venv/bin/python -m fastafd.evaluate --weights "$example" --arch resnet18 --dataset cifar10 --data-dir "$trees/1000" \
    --attack pgd20 --n 1000 --json >runs/resnet18-natural.json

for name in resnet8-afd resnet8-off resnet18-afd resnet18-off; do
    cp "runs/$name/result.json" "$results/small-$name.json"
done
cp runs/resnet18-natural.json "$results/small-resnet18-natural.json"
echo "all of it in $results"
