#!/usr/bin/env bash
# Makes the virtual environment: requirements/install.sh VENV PYTHON. Run by the Makefile.
# A CUDA torch (2.11 or later) that PYTHON already has is kept and used; otherwise the pinned CPU torch is installed.
set -euo pipefail
cd "$(dirname "$0")"
venv=$1 python=$2

say() { echo "specrt: $*" >&2; }
stop() { say "$@"; exit 1; }

command -v "$python" >/dev/null || stop "no '$python'; install Python 3.10 or later (apt-get install python3 python3-venv), or name one: make PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || stop "$("$python" --version) is too old; Python 3.10 or later is needed (make PYTHON=...)"
"$python" -c 'import ensurepip, venv' 2>/dev/null || stop "this Python cannot make virtual environments; run: apt-get install python3-venv"
command -v c++ >/dev/null || stop "no C++ compiler; run: apt-get install g++"

cuda_torch=$("$python" - <<'PY' 2>/dev/null || true
import os, torch
version = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
if torch.version.cuda and version >= (2, 11):
    print(os.path.dirname(os.path.dirname(torch.__file__)))
PY
)

if [ -n "$cuda_torch" ]; then
  say "using the CUDA torch of $python"
  "$python" -m venv --system-site-packages "$venv"
  # If that Python is itself of a virtual environment, its packages are not "system site packages": name their folder.
  echo "$cuda_torch" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/host.pth"
  "$venv/bin/python" -m pip install --quiet --retries 1 --timeout 30 -r run.txt ||
    say "could not install the pinned packages: going on with what $python has"
else
  "$python" -m venv "$venv"
  pin=$(cat torch.txt)
  # A wheel without CUDA, from the indexes that are configured here or else from torch's own; the last resort brings the CUDA packages along.
  "$venv/bin/python" -m pip install --quiet -c constraints.txt "$pin+cpu" 2>/dev/null ||
    "$venv/bin/python" -m pip install --quiet -c constraints.txt "$pin+cpu" --extra-index-url https://download.pytorch.org/whl/cpu ||
    "$venv/bin/python" -m pip install --quiet -c constraints.txt "$pin"
  "$venv/bin/python" -m pip install --quiet -r run.txt
fi
# The checkout itself, and its command: .venv/bin/specrt.
dirname "$PWD" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/specrt.pth"
printf '#!%s\nimport sys\n\nfrom specrt.cli import main\n\nsys.exit(main())\n' "$venv/bin/python" >"$venv/bin/specrt"
chmod +x "$venv/bin/specrt"
"$venv/bin/python" - <<'PY'
import importlib.util, sys
missing = [m for m in ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "rich", "huggingface_hub") if importlib.util.find_spec(m) is None]
if missing:
    sys.exit(f"specrt: packages missing from the virtual environment: {', '.join(missing)}")
PY
