#!/usr/bin/env bash
# Runs every fuzz target of a build folder for some seconds, keeping what it finds there.
#   tests/fuzz/run.sh BUILD SECONDS
# Prints one line per target, "fuzz NAME: ok" or "fuzz NAME: FAILED"; fails if any failed.
set -euo pipefail
build=$(cd "$1" && pwd)
seconds=$2
data=$(cd "$(dirname "$0")/../data" 2>/dev/null && pwd) || data=""
failed=0 count=0
for program in "$build"/fuzz_*; do
  [[ -f $program && -x $program ]] || continue
  name=$(basename "$program")
  corpus=$build/corpus/$name
  mkdir -p "$corpus"
  # Valid files to start from, where the repository has some.
  seed=""
  case $name in
    fuzz_config) seed=$data/tiny-llama3/config.json ;;
    fuzz_tokenizer) seed=$data/tiny-llama3/tokenizer.json ;;
  esac
  [[ -f $seed ]] && cp "$seed" "$corpus/seed"
  count=$((count + 1))
  log=$build/$name.log
  if (cd "$build" && "$program" -max_total_time="$seconds" -max_len=262144 -timeout=20 \
      -rss_limit_mb=3000 -print_final_stats=1 "$corpus") >"$log" 2>&1; then
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    echo "fuzz $name: ok ($runs inputs in $seconds s)"
  else
    failed=$((failed + 1))
    echo "fuzz $name: FAILED, the end of $log:"
    tail -n 40 "$log"
  fi
done
if ((count == 0)); then
  echo "no fuzz targets in $build"
  exit 1
fi
exit $((failed > 0))
