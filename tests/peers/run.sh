#!/usr/bin/env bash
# One suite: run.sh 446|5|peft [arguments of pytest: files of upstream's, -k ...]. See README.md for the variables.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
which=$1; shift
export PROJECT=${PROJECT:-$(cd "$here/../.." && pwd)}
PEERS_ROOT=${PEERS_ROOT:-$PROJECT/.venv-peers}
export PEER_WORK=${PEER_WORK:-$PEERS_ROOT/work/$which} PEER_PRODUCT=${PEER_PRODUCT:-$PROJECT/src}
if [ -z "${PEER_NATIVE+set}" ]; then
  PEER_NATIVE=$(dirname "$(ls "$PROJECT"/.venv/lib/python3.*/site-packages/llama2/_native* 2>/dev/null | head -n 1)" 2>/dev/null || true)
  export PEER_NATIVE
fi
export PEER_TOKENIZER=${PEER_TOKENIZER:-${LLAMA2_TEST_DATA:-$PROJECT/../shared/data}/llama2-tokenizer/tokenizer.model}
[ -f "$PEER_TOKENIZER" ] || { echo "PEER_TOKENIZER=$PEER_TOKENIZER is no file; give Llama 2's tokenizer.model" >&2; exit 2; }
more=
case $which in
  446) suite=t446 python=v446; export PEER_VERSIONS_AS=${PEER_VERSIONS_AS:-tokenizers=0.20.3} ;;
  5) suite=t5 python=v5 more=$PEERS_ROOT/t50; export PEER_VERSIONS_AS=${PEER_VERSIONS_AS:-tokenizers=0.22.1,huggingface-hub=1.3.0} ;;
  peft) suite=peft python=v5 ;;
  *) echo "run.sh 446|5|peft, not $which" >&2; exit 2 ;;
esac
export PEER_UPSTREAM=${PEER_UPSTREAM:-$PEERS_ROOT/up/$suite}
[ -d "$PEER_UPSTREAM/tests" ] || { echo "$PEER_UPSTREAM/tests is missing; \`make peers T446=... T5=... PEFT=...\` makes it (tests/peers/README.md)" >&2; exit 2; }
export PYTHONPATH=$here:$more PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false RUN_SLOW=${RUN_SLOW:-1}
cd "$PEER_UPSTREAM"
exec "${PEER_PYTHON:-$PEERS_ROOT/$python/bin/python}" -m pytest -p peer_shim --noconftest -c "$here/pytest.ini" \
  --rootdir "$PEER_UPSTREAM" -p no:cacheprovider "$@"
