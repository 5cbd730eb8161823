#!/bin/sh
# npm test: sets up what is missing, then runs all tests; arguments go to the test runner.
set -eu
cd "$(dirname "$0")/.."
sh scripts/setup.sh
exec node_modules/.bin/vitest run "$@"
