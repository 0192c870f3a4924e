#!/usr/bin/env bash
# What keeping hidden states adds to scoring: CHATS. SMOKE=1: six chats, nothing written.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 1 "CHATS" "$@"
run 009_features.bench --data "$1"
