#!/usr/bin/env bash
# Builds llama.cpp or ik_llama.cpp natively from source folders, for bench/rivals.py and bench/serve.py:
#
#   bench/rivals.sh SRC [SRC ...]            prints the folder of the programs of each
#   FLAGS='-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON' bench/rivals.sh SRC    for one instruction set
#
# BUILD names the build folder inside SRC (build-bench), JOBS the compilers at once. Nothing is fetched.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,7p' "$0" >&2; exit 2; }
FLAGS=${FLAGS:--DGGML_NATIVE=ON}
for source in "$@"; do
  [ -f "$source/CMakeLists.txt" ] && [ -d "$source/ggml" ] || { echo "$source: no source folder of llama.cpp (CMakeLists.txt and ggml/ are expected)" >&2; exit 2; }
  build=$source/${BUILD:-build-bench}
  # shellcheck disable=SC2086  # several flags
  cmake -S "$source" -B "$build" -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DGGML_CCACHE=OFF $FLAGS >&2
  cmake --build "$build" -j "${JOBS:-$(nproc)}" --target llama-bench llama-server llama-batched-bench >&2
  echo "$(cd "$build" && pwd)/bin"
done
