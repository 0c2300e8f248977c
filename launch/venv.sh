# Sourced by launch/demo.sh and tests/run.sh: a virtual environment of our own in .venv, with the pinned packages.
# Installs once; again where setup.cfg or the pins have changed.  No compiler is needed.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
stamp="$(cat setup.cfg constraints.txt | cksum | tr -d ' ')"
if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
  echo "installing pinned packages into .venv (once, about 2 minutes and 2 GB)"
  "${PYTHON:-python3}" -m venv .venv
  # torch by itself and first: deepspeed's set-up looks for it.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy wheel
  DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,export]'
  echo "$stamp" > .venv/installed
fi
export PATH="$root/.venv/bin:$PATH"
