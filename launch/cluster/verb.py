"""`shoestring cluster`: train on nodes that are simulated on this machine."""

import argparse

from ..answers.options import add_override_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_override_arguments(parser, with_fresh=True)
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="number of simulated nodes")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="N", help="CPU ranks per node")
    parser.add_argument("--uplink", metavar="RATE", help="bandwidth limit per node, such as 200mbit (default: none)")
    for option, text in (("--cut-link", "disconnect a node"), ("--kill-node", "kill all processes of a node")):
        parser.add_argument(option, action="append", default=[], metavar="NODE@STEP", help=f"{text} after this step")


def run(options: argparse.Namespace) -> int:
    """Train on the simulated nodes that the options describe."""
    from .cluster_run import SimulatedClusterRun, run_on_simulated_cluster

    faults = [("--cut-link", text) for text in options.cut_link]
    faults += [("--kill-node", text) for text in options.kill_node]
    size = options.nodes, options.gpus_per_node, options.uplink
    return run_on_simulated_cluster(
        SimulatedClusterRun(options.overrides, options.config_dir, options.fresh, *size, faults)
    )
