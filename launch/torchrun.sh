#!/usr/bin/env bash
# Train on one node or on several: start this on each node with the same arguments, those of `shoestring train`.
#
#   ./launch/torchrun.sh experiment=quickstart
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 ./launch/torchrun.sh experiment=... topology.gpus_per_node=8    on node0
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 ./launch/torchrun.sh experiment=... topology.gpus_per_node=8    on node1
#
#   NNODES          number of nodes; default 1
#   NODE_RANK       number of this node, from 0; required if NNODES > 1
#   MASTER_ADDR     name or address of node 0; required if NNODES > 1
#   MASTER_PORT     a free TCP port on node 0; default 29500
#   GPUS_PER_NODE   ranks on each node; default: its GPUs, or on CPUs an equal share of the topology's ranks
#   PYTHON          an interpreter that has shoestring; default: that of .venv, else python3
#
# training.run_dir and the prepared data must be on a file system that all nodes share. Before a rank starts, the nodes
# connect at MASTER_ADDR:MASTER_PORT, within training.rendezvous_timeout_seconds, and compare configuration, code and
# data; node 0 resolves `${now:...}` for all. Settings from the environment (`${oc.env:...}`) must be the same.
# SIGTERM, SIGUSR1, SIGHUP or SIGQUIT on any node makes the run finish its step, write a checkpoint and exit with 75. It
# exits immediately after a second SIGTERM or SIGQUIT, or if it is still running after training.stop_seconds.
# Exit code, on every node: 0 done, 2 invalid configuration, 3 budget used up, 75 run again, else failed.
set -euo pipefail

here="$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$here/../.venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi
# -P: modules of the working directory are not imported.
where='import os, shoestring.launch as code; print(os.path.realpath(code.__file__).rpartition("/launch/")[0])'
if ! code="$("$PYTHON" -P -c "$where" 2>/dev/null)"; then
    echo "$PYTHON has no shoestring. Install it (pip install -e $(dirname "$here")), or set PYTHON." >&2
    exit 2
fi
if [[ "$code" != "$(dirname "$here")" ]]; then  # a .venv that was copied
    echo "$PYTHON runs the code in $code, not in $(dirname "$here"). Recreate .venv, or set PYTHON." >&2
fi
exec "$PYTHON" -P -m shoestring.launch.run.node "$@"
