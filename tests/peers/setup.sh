#!/usr/bin/env bash
# Makes what run.sh uses under $PEERS_ROOT, each part where it is missing: two environments, and upstream's tests from
# snapshots of their repositories. T446, T5 and PEFT: git directories, see README.md.
set -euo pipefail
: "${PEERS_ROOT:?a folder for environments and snapshots}"
PYTHON=${PYTHON:-python3}
mkdir -p "$PEERS_ROOT/up"; cd "$PEERS_ROOT"

snapshot() { # name, git directory, commit, variable, folders
  [ -d "up/$1/tests" ] && return
  [ -n "$2" ] || { echo "upstream's tests for $1 are missing: give $4=GIT_DIRECTORY (tests/peers/README.md says of which repository)" >&2; exit 2; }
  git -C "$2" rev-parse --quiet --verify "$3^{commit}" >/dev/null || { echo "$4=$2 has no commit $3 (tests/peers/README.md)" >&2; exit 2; }
  rm -rf "up/$1.part"; mkdir -p "up/$1.part"
  git -C "$2" archive "$3" ${@:5} | tar x -C "up/$1.part"
  mv "up/$1.part" "up/$1"
}
snapshot t446 "${T446:-}" "${T446_COMMIT:-70b07d97c}" T446 tests utils
snapshot t5 "${T5:-}" "${T5_COMMIT:-HEAD}" T5 tests utils
snapshot peft "${PEFT:-}" "${PEFT_COMMIT:-HEAD}" PEFT tests

common="torch==2.13.0 numpy safetensors sentencepiece tokenizers==0.23.3 jinja2 rich pytest pytest-timeout parameterized protobuf psutil"
environment() { # folder, then arguments of pip
  [ -f "$1/done" ] || { [ -x "$1/bin/python" ] && "$1/bin/python" -c 'import transformers, accelerate' 2>/dev/null; } && return
  "$PYTHON" -m venv "$1"
  "$1/bin/python" -m pip install -q $common "${@:2}"
}
if [ ! -f v446/done ]; then
  environment v446 "huggingface_hub<1.0" accelerate regex requests pyyaml datasets
  v446/bin/python -m pip install -q --no-deps transformers==4.46.3
  touch v446/done
fi
if [ ! -f v5/done ]; then
  environment v5 transformers==5.23.0 peft==0.21.2 trl==1.16.0 accelerate datasets lm-eval bitsandbytes httpx typer-slim
  touch v5/done
fi
[ -d t50/transformers ] || v5/bin/python -m pip install -q --target t50 --no-deps transformers==5.0.0
mkdir -p up/t446/src up/t5/src
ln -sfn "$(echo "$PEERS_ROOT"/v446/lib/python3.*/site-packages/transformers)" up/t446/src/transformers
ln -sfn "$PEERS_ROOT/t50/transformers" up/t5/src/transformers
