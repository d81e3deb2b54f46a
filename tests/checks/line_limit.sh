#!/usr/bin/env bash
# No source file has more than 600 lines. Usage: line_limit.sh SOURCE_DIR
set -euo pipefail
cd "$1"
limit=600
folders=()
for f in formats engine cuda eval bench vision tests; do [[ -d $f ]] && folders+=("$f"); done
bad=0 count=0
while IFS= read -r file; do
  count=$((count + 1))
  lines=$(wc -l <"$file")
  if ((lines > limit)); then
    echo "$file: $lines lines, at most $limit are allowed"
    bad=1
  fi
done < <(find "${folders[@]}" -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o \
         -name '*.cuh' -o -name '*.sh' \))
if ((count == 0)); then
  echo "no source files found in $1"
  exit 1
fi
echo "$count files checked"
exit $bad
