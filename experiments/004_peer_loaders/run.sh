#!/usr/bin/env bash
# Our drafts in the peers' own loaders: RUN PEER_PYTHON EAGLE_CHECKOUT WORK
# RUN is a training run's directory (demo-run/arms/full). See README.md for what PEER_PYTHON has installed.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 4 "RUN PEER_PYTHON EAGLE_CHECKOUT WORK" "$@"
here=$root/experiments/004_peer_loaders
[[ -d $4/target ]] || run 005_vllm.write_target "$4/target"
run 004_peer_loaders.ours "$1" "$4/target" "$4"
"$2" "$here/peers.py" "$4" "$4/target" "$3" "$here/results.json"
run 004_peer_loaders.reread "$4"
