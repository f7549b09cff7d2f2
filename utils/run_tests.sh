#!/usr/bin/env bash
# Set up, then lint and test. Options go to pytest: utils/run_tests.sh -k scan
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "${root}"
utils/setup_env.sh
# shellcheck source=egs2/TEMPLATE/ssl1/path.sh
. egs2/TEMPLATE/ssl1/path.sh

echo "lint: ruff, shellcheck"
ruff check .
git ls-files -z -- '*.sh' .ci/run | xargs -0 shellcheck -x
python -m pytest "$@"
