#!/usr/bin/env bash
# What only an accelerator can say, in eight minutes: experiments/on_a_chip.sh [--small] [--only=PARTS] [--minutes=8]; see on_a_chip.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-}
for each in .venv/bin/python python3 python; do
  test -n "$python" || ! command -v "$each" > /dev/null || python=$each
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec "$python" experiments/on_a_chip.py "$@"
