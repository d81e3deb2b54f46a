#!/usr/bin/env bash
# .ci/spills accepts a clean report of ptxas, and fails for spills and for a kernel that is not there.
# Usage: spills_check.sh SOURCE_DIR
set -euo pipefail
cd "$1"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# kernel ARCH NAME FRAME STORES LOADS: what ptxas -v says about one kernel.
kernel() {
  echo "ptxas info    : Compiling entry function '_ZN6engine${#2}${2}EPfl' for '$1'"
  echo "ptxas info    : Function properties for _ZN6engine${#2}${2}EPfl"
  echo "    $3 bytes stack frame, $4 bytes spill stores, $5 bytes spill loads"
  echo "ptxas info    : Used 40 registers, used 1 barriers"
}
# report FRAME STORES LOADS of hot_a_kernel on sm_80, then the same on sm_90.
report() {
  kernel sm_80 hot_a_kernel "$1" "$2" "$3"
  kernel sm_80 hot_b_kernel 0 0 0
  kernel sm_80 cold_kernel 64 64 64
  kernel sm_90 hot_a_kernel "$4" "$5" "$6"
  kernel sm_90 hot_b_kernel 0 0 0
}

bad=0 count=0
# expect STATUS TEXT NAME: the exit status for log NAME, and what must be said.
expect() {
  local status=0
  .ci/spills "$folder/$3" hot_a_kernel hot_b_kernel >"$folder/said" 2>&1 || status=$?
  count=$((count + 1))
  if [[ $status != "$1" ]] || ! grep -qF -- "$2" "$folder/said"; then
    echo "$3: expected status $1 and \"$2\", found status $status and:"
    cat "$folder/said"
    bad=1
  fi
}

report 0 0 0 0 0 0 >"$folder/good"
expect 0 "4 kernels" good
report 8 4 4 0 0 0 >"$folder/spills_80"
expect 1 "sm_80: engine::hot_a_kernel" spills_80
report 16 0 0 0 0 0 >"$folder/array_80"
expect 1 "16 bytes of stack frame" array_80
report 0 0 0 8 32 4 >"$folder/few_90"
expect 0 "tolerated" few_90
report 0 0 0 32 36 40 >"$folder/many_90"
expect 1 "36 of spill stores" many_90
report 0 0 0 16 0 0 >"$folder/array_90"
expect 1 "16 bytes of stack frame" array_90
kernel sm_80 hot_a_kernel 0 0 0 >"$folder/missing"
expect 1 "no kernel is named hot_b_kernel" missing
echo "nothing of ptxas" >"$folder/empty"
expect 1 "found none" empty
echo "$count reports checked"
exit $bad
