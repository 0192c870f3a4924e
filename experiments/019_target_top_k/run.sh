#!/usr/bin/env bash
# The target's likeliest tokens in place of its head: CHATS. SMOKE=1: four chats, nothing written.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 1 "CHATS" "$@"
run 019_target_top_k.run --data "$1"
