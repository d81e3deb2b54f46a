#!/usr/bin/env bash
# The demo: a small LLaMA3-shaped model at full precision, rounded to nearest at 4 bits, and with
# GPTQ at 4, 3 and 2 bits, each evaluated on text that calibration did not see.
# Run from the build folder: bash ../tests/demo.sh. Files and reports go to demo/.
set -euo pipefail
model=$(cd "$(dirname "$0")/data/tiny-llama3" && pwd)
program=./engine
[[ -x $program ]] || { echo "no $program here: run this in the build folder" >&2; exit 1; }
out=demo
rm -rf "$out"
mkdir -p "$out/logs"

# Each window is one sample of the full-precision model, from its BOS on, so that the log of the ratio
# of two perplexities estimates the KL divergence between the models.
evaluate() {  # NAME MODEL
  "$program" ppl --model "$2" --text "$model/heldout.safetensors:tokens" --seq 512 \
    --report "$out/$1.ppl.json" >"$out/logs/$1.ppl.txt"
}
quantize() {  # NAME METHOD BITS [OPTIONS]
  local name=$1 method=$2 bits=$3
  shift 3
  echo "quantize $name"
  "$program" quantize --model "$model" --method "$method" --bits "$bits" --group 128 "$@" \
    --out "$out/$name.qw" --report "$out/$name.quantize.json" >"$out/logs/$name.quantize.txt"
  evaluate "$name" "$out/$name.qw"
}

calibration=(--calib "$model/calib.txt" --samples 128 --seq 512 --seed 0)
echo "evaluate full-precision"
evaluate full-precision "$model"
quantize rtn-4bit rtn 4
quantize gptq-4bit gptq 4 "${calibration[@]}"
quantize gptq-3bit gptq 3 "${calibration[@]}"
quantize gptq-2bit gptq 2 "${calibration[@]}"

echo
"$program" table "$out"
