#!/usr/bin/env bash
# Seconds and memory of what every row passes through, at 10^4, 10^5 and 10^6 rows (select also at 10^7), and the plot.
# SMOKE=1: 10^3 and 10^4, no file. With CHATS, a file of real chats, also how fast it is read beside the tokenizer's library alone.
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
if [[ ${SMOKE:-} ]]; then
    run 025_scale.scale --rows 1000 10000
    exit
fi
run 025_scale.scale --rows 10000 100000 1000000 10000000 --results "$root/experiments/025_scale/results.jsonl"
run 025_scale.plot
if (($#)); then
    run 025_scale.reading "$1" --processes "$(nproc)" --results "$root/experiments/025_scale/reading.jsonl"
fi
