"""Verbs that run training: `train`, and `cluster` on simulated nodes."""

from __future__ import annotations

import argparse

from .options import Subparsers, add_override_arguments, get_overrides


def add_commands(verbs: Subparsers) -> None:
    """Add this family's verbs."""
    _add_train(verbs)
    _add_cluster(verbs)


def _add_train(verbs: Subparsers) -> None:
    train = add_override_arguments(
        verbs.add_parser("train", help="train a model; resumes from the run's last checkpoint if there is one")
    )
    _add_fresh(train)
    train.add_argument("--cfg", choices=["job"], help="print the composed configuration, do not train")
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    if options.cfg:
        from ..compose import compose_run_config, config_to_yaml
        from ..console import print_or_raise

        print_or_raise(config_to_yaml(compose_run_config(*get_overrides(options))).removesuffix("\n"))
        return 0
    from ..run.train import train_command

    return train_command(*get_overrides(options), fresh=options.fresh)


def _add_cluster(verbs: Subparsers) -> None:
    cluster = add_override_arguments(
        verbs.add_parser("cluster", help="train on simulated nodes: network namespaces on this machine")
    )
    cluster.add_argument("--nodes", type=int, required=True, metavar="N", help="number of simulated nodes")
    cluster.add_argument("--gpus-per-node", type=int, required=True, metavar="N", help="CPU ranks per node")
    cluster.add_argument("--uplink", metavar="RATE", help="bandwidth limit per node, such as 200mbit (default: none)")
    _add_fresh(cluster)
    for option, text in (("--cut-link", "disconnect a node"), ("--kill-node", "kill all processes of a node")):
        cluster.add_argument(option, action="append", default=[], metavar="NODE@STEP", help=f"{text} after this step")
    cluster.set_defaults(run=_cluster)


def _cluster(options: argparse.Namespace) -> int:
    from ..cluster.cluster_run import SimulatedClusterRun, run_on_simulated_cluster

    faults = [("--cut-link", text) for text in options.cut_link]
    faults += [("--kill-node", text) for text in options.kill_node]
    run = *get_overrides(options), options.fresh
    return run_on_simulated_cluster(
        SimulatedClusterRun(*run, options.nodes, options.gpus_per_node, options.uplink, faults)
    )


def _add_fresh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fresh", action="store_true", help="first delete the files of an earlier run in training.run_dir"
    )
