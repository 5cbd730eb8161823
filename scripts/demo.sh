#!/bin/sh
# npm run demo: sets up what is missing, builds, then shows a live machine being backed up and restored.
set -eu
cd "$(dirname "$0")/.."
sh scripts/setup.sh --build
exec node --import tsx scripts/demo.ts "$@"
