#!/usr/bin/env bash
# Time and arithmetic against the share of tokens: CHATS. SMOKE=1: one turn, nothing written.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 1 "CHATS" "$@"
run 021_token_share.run --data "$1"
