#!/usr/bin/env bash
# Train on one machine or on several: start this on each of them with the same arguments, those of `shoestring train`.
#
#   ./launch/torchrun.sh experiment=quickstart
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 ./launch/torchrun.sh experiment=... topology.gpus_per_node=8    on node0
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 ./launch/torchrun.sh experiment=... topology.gpus_per_node=8    on node1
#
#   NNODES          machines; 1 when it is not set
#   NODE_RANK       number of this machine, from 0; needed for several
#   MASTER_ADDR     name or address of machine 0; needed for several
#   MASTER_PORT     a free TCP port on machine 0; 29500 when it is not set
#   GPUS_PER_NODE   ranks on each machine; when it is not set, its GPUs, or on CPUs the topology's ranks dealt out
#   PYTHON          an interpreter that has shoestring; when it is not set, that of .venv, else python3
#
# training.run_dir and the prepared data must be on a file system that all machines share. Before a rank starts, the
# machines meet at MASTER_ADDR:MASTER_PORT, for at most training.rendezvous_timeout_seconds, and compare configuration, code
# and data; machine 0 resolves `${now:...}` for all. Settings from the environment (`${oc.env:...}`) must be the same.
# SIGTERM, SIGUSR1, SIGHUP or SIGQUIT on any machine makes the run finish its step, write a checkpoint and exit with 75; a
# second SIGTERM or SIGQUIT, or training.stop_seconds without an end, ends it at once.
# Exit code, on every machine: 0 done, 2 refused, 3 budget used up, 75 start it again, else a fault.
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
    echo "$PYTHON has no shoestring. Install it (pip install -e $(dirname "$here")), or name another in PYTHON." >&2
    exit 2
fi
if [[ "$code" != "$(dirname "$here")" ]]; then  # a .venv that was copied
    echo "$PYTHON runs the code in $code, and not that beside this script. Make .venv anew, or name another in PYTHON." >&2
fi
exec "$PYTHON" -P -m shoestring.launch.run.node "$@"
