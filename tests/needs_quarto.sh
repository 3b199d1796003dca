#!/bin/sh
# stands in the environment in the place of nbdev_docs, nbdev_preview and nbdev_readme: without Quarto these would install it, and packages over the locked ones
name=$(basename "$0")
command -v quarto >/dev/null || { echo "$name needs Quarto, which is not installed (https://quarto.org); the pages are read in JupyterLab: make lab" >&2; exit 1; }
exec "$(dirname "$0")/python" -c 'import sys; from nbdev import quarto; getattr(quarto, sys.argv.pop(1))()' "$name" "$@"
