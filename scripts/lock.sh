#!/bin/sh
# Pin every dependency with its hashes into requirements/. Run by `make lock`.
# requirements/go.txt is pinned by hand: a Go that is known to build OPA and Regal.
set -eu
cd "$(dirname "$0")/.."
compile() {
    name=$1
    shift
    .venv/bin/uv pip compile --quiet "$@" --universal --python-version 3.11 \
        --generate-hashes --no-emit-index-url --no-header --no-annotate \
        --output-file "requirements/$name.txt"
}
compile base pyproject.toml
compile demo pyproject.toml --extra demo --group build
# What the image is built with, and of.
compile build --group build --constraints requirements/demo.txt
compile server pyproject.toml --extra server --constraints requirements/demo.txt
compile dev pyproject.toml --extra demo --group dev
# The peers that the benchmarks measure beside ours.
compile peers requirements/peers.in
