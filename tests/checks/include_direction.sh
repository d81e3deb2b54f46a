#!/usr/bin/env bash
# Includes go in one direction (docs/architecture.md). Usage: include_direction.sh SOURCE_DIR
set -euo pipefail
cd "$1"
bad=0

# refuse FOLDER REGEX REASON: no quoted include of FOLDER's files matches REGEX.
refuse() {
  local folder=$1 regex=$2 reason=$3 hits
  [[ -d $folder ]] || return 0
  hits=$(grep -rnE "^[[:space:]]*#[[:space:]]*include[[:space:]]*[\"<]($regex)" "$folder" || true)
  if [[ -n $hits ]]; then
    echo "$reason:"
    echo "$hits"
    bad=1
  fi
}

# A name that is checked must exist, or the rule would hold for nothing.
for folder in formats engine cuda eval bench tests; do
  [[ -d $folder ]] || { echo "no folder $folder in $1"; exit 1; }
done

refuse formats '(engine|cuda|eval|bench|vision|tests)/' 'formats includes nothing of the others'
refuse engine '(cuda|eval|bench|vision|tests)/[a-z_]+\.(h|cuh)' 'engine includes formats only'
refuse cuda '(engine/(model|quant|train|cmd)|formats|eval|bench|vision|tests)/' \
  'cuda includes engine/core, engine/weight and engine/ops only'
refuse eval '(cuda|bench|tests)/' 'eval includes engine and formats'
refuse bench '(cuda|tests)/' 'bench includes engine, formats and eval'
# Inside the engine: core < weight < ops < model < quant < cmd.
refuse engine/core 'engine/(weight|model|quant|cmd)/' 'engine/core is the lowest part'
refuse engine/weight 'engine/(ops|model|quant|cmd)/' 'engine/weight includes core'
refuse engine/ops 'engine/(model|quant|cmd)/' 'engine/ops includes core and weight'
refuse engine/model 'engine/(quant|cmd)/' 'engine/model includes core, weight and ops'
refuse engine/quant 'engine/cmd/' 'engine/quant does not know the commands'
# Backends and methods are reached through interfaces.
refuse engine/quant 'engine/quant/methods/' 'nothing includes a method'
exit $bad
