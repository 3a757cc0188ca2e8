#!/bin/sh
# A parameter sweep that may be interrupted anywhere, and simply run again.
#
#   FLUXRES_URI=… examples/sweep.sh NAME COMMAND…       COMMAND is run with 1, 2, … 10 as its last argument
#
# Each submission has a key made of NAME and the parameter. A key is taken once: running the script again, after a
# Ctrl-C, a broken connection or a reboot of the login node, submits what is missing and finds the rest again.
# Exit status: 0 when all jobs succeeded.
set -eu
name=${1:?usage: sweep.sh NAME COMMAND…}
shift
jobs=
for value in $(seq 10); do
    jobs="$jobs $(fluxres submit --key="$name-$value" --job-name="$name-$value" "$@" "$value")"
done
status=0
# shellcheck disable=SC2086  # one word a jobid is meant
fluxres job wait $jobs || status=$?
for job in $jobs; do
    fluxres job attach "$job" </dev/null 2>/dev/null || status=1
done
exit "$status"
