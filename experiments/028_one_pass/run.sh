#!/usr/bin/env bash
# What recording costs beside plain decoding and a scoring pass, and how near its states are to a pass over whole texts: CHATS.jsonl.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
need 1 "CHATS.jsonl" "$@"
run 028_one_pass.one_pass "$1"
