#!/usr/bin/env bash
# Memory and work on forced CPU devices: CHATS.jsonl.gz; or, on a machine with a GPU: --gpu. SMOKE=1: fewer chats, nothing written.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 1 "CHATS.jsonl.gz | --gpu" "$@"
if [[ $1 == --gpu ]]; then run 008_devices.gpu; else run 008_devices.cpu --data "$1"; fi
