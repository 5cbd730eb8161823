#!/bin/sh
# Makes a clone ready: Debian packages, npm packages and, with --build, dist/. Says nothing and takes no time
# when nothing is missing. Plain shell, since before it has run there may be nothing but Node and npm.
#
#     sh scripts/setup.sh [--build]
set -eu
cd "$(dirname "$0")/.."

NODE_WANTED=20.19
APT="apt-get -o DPkg::Lock::Timeout=600 -qq"

say() { echo "setup: $*" >&2; }
fail() { say "$@"; exit 1; }

check_node() {
  command -v node >/dev/null 2>&1 || fail "Node is not installed; tidemark needs Node $NODE_WANTED or newer, with npm"
  command -v npm >/dev/null 2>&1 || fail "npm is not installed; it comes with Node $NODE_WANTED or newer"
  version=$(node --version)
  major=${version#v}; minor=${major#*.}; major=${major%%.*}; minor=${minor%%.*}
  if [ "$major" -lt "${NODE_WANTED%.*}" ] || { [ "$major" -eq "${NODE_WANTED%.*}" ] && [ "$minor" -lt "${NODE_WANTED#*.}" ]; }; then
    fail "this is Node $version; tidemark needs $NODE_WANTED or newer"
  fi
}

# need <package> <command>...: notes the package when one of its commands is not there.
need() {
  package=$1; shift
  for name in "$@"; do
    command -v "$name" >/dev/null 2>&1 && continue
    missing="$missing $package"
    return 0
  done
}

find_missing() {
  missing=
  need qemu-system-x86 qemu-system-x86_64
  [ -e /usr/share/seabios/bios-256k.bin ] || [ -e /usr/share/qemu/bios-256k.bin ] || missing="$missing seabios"
  [ -e /usr/share/OVMF/OVMF_CODE_4M.fd ] || missing="$missing ovmf"
  need qemu-utils qemu-img qemu-io qemu-nbd
  need qemu-system-common qemu-storage-daemon
  need libnbd-bin nbdinfo nbdcopy
  need nbdkit nbdkit
  need e2fsprogs mkfs.ext4 filefrag
  need xfsprogs mkfs.xfs
  need btrfs-progs mkfs.btrfs
  need openssl openssl
  need g++ g++
  need make make
  need python3 python3
}

# quietly <what> <command>...: shows what a command printed only when it fails.
quietly() {
  what=$1; shift
  log=$(mktemp)
  if "$@" >"$log" 2>&1; then rm -f "$log"; return 0; fi
  cat "$log" >&2
  rm -f "$log"
  fail "$what failed"
}

install_system_packages() {
  find_missing
  [ -z "$missing" ] && return 0
  if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" -ne 0 ]; then
    say "missing Debian packages; run this as root, then again what you wanted:"
    say "    apt-get install --no-install-recommends$missing"
    exit 1
  fi
  say "installing Debian packages:$missing"
  export DEBIAN_FRONTEND=noninteractive
  quietly "apt-get update" $APT update
  # shellcheck disable=SC2086  # options and package names are words
  quietly "apt-get install" $APT install -y --no-install-recommends $missing
  find_missing
  [ -z "$missing" ] || fail "still missing after their packages were installed:$missing"
}

# Two set-ups of one clone wait for each other. The lock goes with the process.
take_turn() {
  mkdir -p .setup
  exec 9>.setup/lock
  if command -v flock >/dev/null 2>&1; then flock 9; fi
}

is_stamped() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }

install_node_packages() {
  wanted=$(sha256sum <package-lock.json)
  is_stamped node_modules/.setup-stamp "$wanted" && return 0
  take_turn
  is_stamped node_modules/.setup-stamp "$wanted" && return 0
  say "installing npm packages (zstd-napi may have to be compiled: half a minute)"
  # Where Node's own headers are, so that node-gyp does not look for them on the network.
  prefix=$(node -p 'require("node:path").resolve(process.execPath, "../..")')
  if [ -f "$prefix/include/node/node_api.h" ]; then
    export npm_package_config_node_gyp_nodedir="$prefix"
  fi
  rm -f node_modules/.setup-stamp
  quietly "npm ci" npm ci --no-audit --no-fund --loglevel=error
  echo "$wanted" >node_modules/.setup-stamp
}

hash_of_build() {
  { find src -type f ! -name '*.test.ts' | LC_ALL=C sort; ls package.json tsconfig.json tsconfig.build.json package-lock.json; } |
    tr '\n' '\0' | xargs -0 sha256sum | sha256sum
}

build() {
  wanted=$(hash_of_build)
  is_built "$wanted" && return 0
  take_turn
  is_built "$wanted" && return 0
  say "building dist"
  rm -f node_modules/.build-stamp
  quietly "npm run build" npm run --silent build
  echo "$wanted" >node_modules/.build-stamp
}

is_built() { [ -f dist/cli/main.js ] && is_stamped node_modules/.build-stamp "$1"; }

wants_build=
for argument in "$@"; do
  case $argument in
    --build) wants_build=yes ;;
    *) fail "unknown argument $argument; usage: sh scripts/setup.sh [--build]" ;;
  esac
done

check_node
install_system_packages
install_node_packages
if [ -n "$wants_build" ]; then build; fi
