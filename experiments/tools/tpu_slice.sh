#!/usr/bin/env bash
# Installs jaxkd on all hosts of a Cloud TPU slice, and trains on all of its chips:
#
#     TPU_NAME=my-tpu ZONE=europe-west4-b bash experiments/tools/tpu_slice.sh REPOSITORY --num-seeds 5
#
# REPOSITORY is a git URL that the hosts can read. The hosts need Python 3.11 or newer.
set -euo pipefail
: "${TPU_NAME:?set it to the name of the TPU}" "${ZONE:?set it to the zone of the TPU}"
repository=${1:?give the git URL of jaxkd}
shift

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"
}

on_all_hosts "test -d jaxkd || git clone --depth=1 '$repository' jaxkd"
# The extra has libtpu, and requests, with which JAX asks for the hosts of the slice.
on_all_hosts "pip install -e 'jaxkd[experiments]' 'jax[tpu]'"
# Every host runs the same command; --coordinator auto finds the others.
on_all_hosts "cd jaxkd && python -m experiments.two_cnns --coordinator auto --bf16 $*"
