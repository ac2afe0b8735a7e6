"""The `shoestring` command: one verb a purpose."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from ..comm.refusal import Problem, Refused
from .orphan import die_with_launcher
from .torchrun import RanksFailed

EXIT_FAULT, EXIT_REFUSED = 1, 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run the verb and exit with its code; 2 for refused input, every problem on a line of its own."""
    die_with_launcher()
    options = parse(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        code = run(options)
    except Refused as refused:
        print(f"shoestring {options.verb}: refused", file=sys.stderr)
        for problem in refused.problems:
            print(f"  {problem}", file=sys.stderr)
        code = EXIT_REFUSED
    except RanksFailed as failed:
        print(f"shoestring {options.verb}: {failed}", file=sys.stderr)
        code = EXIT_FAULT
    sys.exit(code)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for; overrides may stand before, between and behind options.

    argparse fills a list of positionals once, with those before the next option, and has no intermixed parsing for
    verbs: what it leaves over are overrides too.
    """
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    left = [text for text in left if text != "--"]
    if left and ("overrides" not in options or any(text.startswith("-") for text in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides = [*options.overrides, *left]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoestring", description="Pretrain a mixture-of-experts model inside a GPU-hour budget."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = _with_overrides(verbs.add_parser("train", help="train, or go on from the run's last checkpoint"))
    _add_fresh(train)
    train.add_argument("--cfg", choices=["job"], help="print the composed configuration instead")
    train.set_defaults(run=_train)

    params = _with_overrides(verbs.add_parser("params", help="parameters, FLOPs a token and activations of a model"))
    params.add_argument("--format", choices=["table", "json"], default="table")
    params.set_defaults(run=_params)

    memory = _with_overrides(verbs.add_parser("memory", help="bytes that each rank of a run needs, by kind"))
    memory.add_argument("--measure", action="store_true", help="run two steps of the real ranks here, and compare")
    memory.add_argument("--one-rank", action="store_true", help="with all tokens of a group on one rank's experts")
    memory.add_argument("--format", choices=["table", "json"], default="table")
    memory.set_defaults(run=_memory)

    _add_cluster(verbs)
    _add_schedule(verbs)
    _add_bench(verbs)
    partition = _with_overrides(verbs.add_parser("partition", help="a model's layers on the stages of a pipeline"))
    partition.add_argument("--stages", type=int, required=True, help="stages the model is cut into")
    partition.add_argument("--layout", metavar="L,L,…", help="the number of layers of each stage, instead of a search")
    partition.add_argument("--schedule", default="one_f_one_b", help="puts stages on ranks (default one_f_one_b)")
    partition.add_argument("--format", choices=["table", "json"], default="table")
    partition.set_defaults(run=_partition)

    _add_planner(verbs)
    doctor = verbs.add_parser("doctor", help="what serves each operation on this machine, and what cannot")
    doctor.add_argument("--format", choices=["table", "json"], default="table")
    doctor.set_defaults(run=_doctor)

    _add_budget(verbs)
    report = verbs.add_parser("report", help="a run as one HTML page: curves, bill, timeline, incidents")
    report.add_argument("run_dir", type=Path, metavar="RUN", help="directory of a run, which may be going on")
    report.add_argument("--out", type=Path, metavar="PATH", help="write there (default: RUN/report.html)")
    report.set_defaults(run=_report)
    watch = verbs.add_parser("watch", help="follow a run in the terminal until it has ended, or Ctrl-C")
    watch.add_argument("run_dir", type=Path, metavar="RUN", help="directory of a run")
    watch.add_argument("--once", action="store_true", help="print how it stands, and be done")
    watch.set_defaults(run=_watch)
    dashboard = _with_overrides(verbs.add_parser("dashboard", help="the wandb workspace for a run's metrics, as JSON"))
    dashboard.add_argument("--save", action="store_true", help="create it on wandb's server instead; needs an account")
    dashboard.set_defaults(run=_dashboard)

    trace = verbs.add_parser("trace", help="what a traced run's timeline adds up to, and a picture of it")
    trace.add_argument("place", type=Path, metavar="TRACE", help="a run's directory, or its merged trace.json")
    trace.add_argument(
        "--svg", type=Path, metavar="FILE", help="draw a forward's and a backward's layer in turns there"
    )
    trace.add_argument("--format", choices=["table", "json"], default="table")
    trace.set_defaults(run=_trace)

    _add_checkpoint(verbs)
    data = verbs.add_parser("data", help="prepare a corpus, look at a prepared one").add_subparsers(
        dest="action", required=True
    )
    for action, text in (("prepare", "train the tokenizer and write token shards"), ("inspect", "what is in them")):
        _with_overrides(data.add_parser(action, help=text)).set_defaults(run=_data)
    return parser


def _add_budget(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    budget = verbs.add_parser("budget", help="what a run has cost, beside the published 2.788 M GPU-hours")
    budget.add_argument("run_or_project", type=Path, metavar="RUN", help="directory of a run, or a project file")
    budget.add_argument("--tokens", metavar="14.8T", help="what so many tokens would cost at this run's price")
    budget.add_argument("--gpus", type=int, metavar="N", help="and how long N such GPUs would take")
    budget.add_argument("--usd-per-gpu-hour", type=float, metavar="PRICE", help="default 2, as in the report")
    budget.add_argument("--sacct", type=Path, metavar="FILE", help="compare with the output of sacct")
    budget.add_argument("--invoice", type=Path, metavar="FILE", help="compare with an invoice, a CSV")
    columns = "what the CSV calls gpu_hours and amount"
    budget.add_argument("--invoice-columns", default="", metavar="gpu_hours=NAME,amount=NAME", help=columns)
    plan = "compare with a plan: what shoestring plan or simulate prints with --format json"
    budget.add_argument("--against", type=Path, metavar="PLAN", help=plan)
    budget.add_argument("--format", choices=["table", "json"], default="table")
    budget.set_defaults(run=_budget)


def _add_cluster(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    cluster = _with_overrides(verbs.add_parser("cluster", help="rehearse a run over several machines on this one"))
    cluster.add_argument("--nodes", type=int, required=True, metavar="N", help="simulated machines")
    cluster.add_argument("--gpus-per-node", type=int, required=True, metavar="N", help="ranks on each, on the CPU")
    cluster.add_argument("--uplink", metavar="RATE", help="of each node, such as 200mbit; no limit without")
    _add_fresh(cluster)
    for option, text in (("--cut-link", "unplug a node"), ("--kill-node", "kill all processes of a node")):
        cluster.add_argument(option, action="append", default=[], metavar="NODE@STEP", help=f"{text} after this step")
    cluster.set_defaults(run=_cluster)


def _add_schedule(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    schedule = verbs.add_parser("schedule", help="a pipeline program, checked and drawn")
    schedule.add_argument("name", metavar="NAME", help="gpipe, one_f_one_b, interleaved, zb1p, dualpipe or dualpipev")
    schedule.add_argument("--stages", type=int, required=True, metavar="P", help="pipeline ranks")
    schedule.add_argument("--micro-batches", type=int, required=True, metavar="N", help="of one global batch")
    schedule.add_argument("--chunks", type=int, metavar="V", help="stages a rank holds, for interleaved (default 2)")
    schedule.add_argument("--format", choices=["ascii", "svg", "json"], default="ascii")
    schedule.add_argument("--times", default="", metavar="F=1,I=1,W=1,FB=3", help="durations of a chunk, to draw with")
    schedule.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to the terminal")
    schedule.set_defaults(run=_schedule)


def _add_bench(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    benches = verbs.add_parser("bench", help="measure a part of this machine").add_subparsers(
        dest="action", required=True
    )
    bench = benches.add_parser("exchange", help="bytes and times of the token exchanges")
    numbers = {"nodes": 2, "gpus-per-node": 2, "hidden": 1024, "tokens": 512, "experts": 64, "top-k": 8}
    numbers |= {"groups": 4, "top-k-groups": 2, "repeats": 5}
    for name, default in numbers.items():
        bench.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    bench.add_argument("--exchanges", default="flat,two_hop", help="default flat,two_hop")
    bench.add_argument("--formats", default="bf16,fp8", help="of rows on their way to experts (default bf16,fp8)")
    bench.add_argument("--overlap", action="store_true", help="measure also how exchanges hide behind computing")
    bench.add_argument("--uplink", metavar="RATE", help="on a simulated cluster with such uplinks, as 200mbit (root)")
    bench.add_argument("--format", choices=["table", "json"], default="table")
    bench.set_defaults(run=_bench)


def _add_planner(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    simulate = _with_overrides(verbs.add_parser("simulate", help="one layout priced and explained, before it runs"))
    simulate.add_argument("--trace", type=Path, metavar="FILE", help="write a timeline for Perfetto")
    simulate.add_argument("--html", type=Path, metavar="FILE", help="write a page with timeline and memory")
    simulate.add_argument("--format", choices=["table", "json"], default="table")
    simulate.set_defaults(run=_simulate)
    _add_inputs(simulate)
    plan = _with_overrides(verbs.add_parser("plan", help="layouts searched and priced against the budget"))
    plan.add_argument("--keep", type=int, default=5, metavar="N", help="layouts to print (default 5)")
    plan.add_argument("--format", choices=["table", "json"], default="table")
    plan.add_argument("--html", type=Path, metavar="FILE", help="write a page of the best layout, with its timeline")
    plan.set_defaults(run=_plan)
    _add_inputs(plan)
    text = "measure this machine's parts for the planner, as a cluster of its own"
    calibrate = _with_overrides(verbs.add_parser("calibrate", help=text))
    folder = Path("runs/calibration")
    calibrate.add_argument("--output", type=Path, default=folder, metavar="DIR", help=f"default {folder}")
    calibrate.add_argument("--ranks", type=int, default=2, metavar="N", help="processes at work (default 2)")
    calibrate.add_argument("--repeats", type=int, default=20, metavar="N", help="of each measurement (default 20)")
    calibrate.set_defaults(run=_calibrate)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    """What a forecast takes and no run configures."""
    parser.add_argument("--comm-sms", type=int, metavar="N", help="SMs lent to the exchange (default: as measured)")
    parser.add_argument("--skew", type=float, metavar="X", help="rows of the fullest rank above the mean (default 0)")
    parser.add_argument("--jitter", type=float, metavar="X", help="spread of nodes' speed (default 0)")
    text = "of the memory that comes and goes, what is lost (default 0.1)"
    parser.add_argument("--fragmentation", type=float, metavar="X", help=text)


def _inputs(options: argparse.Namespace) -> dict[str, object]:
    """Those that were given, by field of the recipe."""
    named = {name: getattr(options, name) for name in ("comm_sms", "skew", "jitter", "fragmentation")}
    return {name: value for name, value in named.items() if value is not None}


def _add_checkpoint(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    actions = verbs.add_parser("checkpoint", help="list, verify and compare checkpoints").add_subparsers(
        dest="action", required=True
    )
    listing = actions.add_parser("ls", help="the checkpoints of a run")
    verify = actions.add_parser("verify", help="read every byte of a checkpoint and check its hash")
    diff = actions.add_parser("diff", help="where two checkpoints differ; exit code 1 where they do")
    for action in (listing, verify, diff):
        action.add_argument("path", type=Path, metavar="RUN", help="a run, or one checkpoint")
        action.add_argument("--format", choices=["table", "json"], default="table")
        action.set_defaults(run=_checkpoint)
    diff.add_argument("other", type=Path, metavar="RUN", help="the one to compare with")
    diff.add_argument("--other-step", type=int, metavar="N", help="of the second run")
    importing = verbs.add_parser("import", help="a checkpoint from released weights (DeepseekV3ForCausalLM)")
    importing.add_argument("source", type=Path, metavar="DIRECTORY", help="config.json and safetensors")
    importing.add_argument("target", type=Path, metavar="TARGET", help="the new checkpoint goes into this directory")
    importing.set_defaults(run=_import)
    export = verbs.add_parser("export", help="a checkpoint as transformers and others read it")
    generate = verbs.add_parser("generate", help="text from a checkpoint, with MTP as a draft")
    for reader in (export, generate):
        reader.add_argument("path", type=Path, metavar="RUN", help="a run, or one checkpoint")
    export.add_argument("directory", type=Path, metavar="DIRECTORY", help="new, or empty")
    export.add_argument("--dtype", choices=["bf16", "fp32", "fp8"], default="bf16", help="default bf16")
    export.add_argument("--rope", choices=["pairs", "halves"], default="pairs", help="order of rotated rows")
    export.add_argument("--max-shard", default="5GB", metavar="SIZE", help="of a file (default 5GB)")
    export.set_defaults(run=_export)
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--tokens", type=int, default=100, metavar="N", help="default 100")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default 0.8)")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--no-draft", action="store_true", help="without MTP, a token a forward")
    generate.set_defaults(run=_generate)
    for with_step in (verify, diff, export, generate):
        with_step.add_argument("--step", type=int, metavar="N", help="instead of the newest")


def _with_overrides(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="group=choice or key=value, as in Hydra")
    parser.add_argument("--config-dir", type=Path, help="a directory with configuration groups of your own")
    return parser


def _add_fresh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fresh", action="store_true", help="delete what an earlier run left in training.run_dir first"
    )


def _train(options: argparse.Namespace) -> int:
    if options.cfg:
        from .compose import compose_run, to_yaml

        print(to_yaml(compose_run(options.overrides, options.config_dir)), end="")
        return 0
    from .train import train_command

    return train_command(options.overrides, options.config_dir, fresh=options.fresh)


def _cluster(options: argparse.Namespace) -> int:
    from .cluster_run import Rehearsal, run_cluster

    faults = [("--cut-link", text) for text in options.cut_link]
    faults += [("--kill-node", text) for text in options.kill_node]
    run = options.overrides, options.config_dir, options.fresh
    return run_cluster(Rehearsal(*run, options.nodes, options.gpus_per_node, options.uplink, faults))


def _params(options: argparse.Namespace) -> int:
    from .params import params_table, params_tree

    if options.format == "json":
        print(json.dumps(params_tree(options.overrides, options.config_dir), indent=1))
    else:
        _show(params_table(options.overrides, options.config_dir))
    return 0


def _memory(options: argparse.Namespace) -> int:
    from .memory import memory_report, memory_table, memory_tree

    if options.one_rank and not options.measure:
        raise Refused([Problem("--one-rank", True, "is how a run is measured; write --measure too")])
    described = options.overrides, options.config_dir
    report = memory_report(*described, measure=options.measure, one_rank=options.one_rank)
    if options.format == "json":
        print(json.dumps(memory_tree(report), indent=1))
    else:
        _show(memory_table(report))
    return 0


def _schedule(options: argparse.Namespace) -> int:
    from .schedule import draw_schedule

    size = options.name, options.stages, options.micro_batches, options.chunks
    drawing = draw_schedule(*size, options.format, options.times)
    if options.output is None:
        print(drawing)
        return 0
    try:
        options.output.write_text(f"{drawing}\n")
    except OSError as error:
        raise Refused([Problem("--output", str(options.output), f"cannot be written: {error.strerror}")]) from None
    return 0


def _partition(options: argparse.Namespace) -> int:
    from .partition import partition_model, partition_table, partition_tree

    described = options.overrides, options.config_dir
    model = partition_model(*described, options.stages, options.schedule, options.layout)
    if options.format == "json":
        print(json.dumps(partition_tree(model), indent=1))
    else:
        _show(partition_table(model))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from .bench_exchange import bench_exchange, bench_tables, read_names
    from .exchange_rank import ExchangeSpec

    chosen = {field.name: getattr(options, field.name) for field in fields(ExchangeSpec) if field.name in options}
    names = {key: read_names(chosen[key], f"--{key}") for key in ("exchanges", "formats")}
    result = bench_exchange(ExchangeSpec(**(chosen | names)), options.uplink)
    if options.format == "json":
        print(json.dumps(result, indent=1))
    else:
        _show(bench_tables(result))
    return 0


def _simulate(options: argparse.Namespace) -> int:
    from .simulate import simulate, simulation_table, simulation_tree, write_files

    simulation = simulate(options.overrides, options.config_dir, _inputs(options))
    write_files(simulation, options.trace, options.html)
    if options.format == "json":
        print(json.dumps(simulation_tree(simulation), indent=1))
    else:
        _show(simulation_table(simulation))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from .plan import plan, plan_table, plan_tree, write_page

    result = plan(options.overrides, options.config_dir, options.keep, _inputs(options))
    if options.html is not None:
        write_page(result, options.html)
    if options.format == "json":
        print(json.dumps(plan_tree(result), indent=1))
    else:
        _show(plan_table(result))
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from .calibrate import calibrate

    size = options.ranks, options.repeats
    written = calibrate(options.overrides, options.config_dir, options.output, *size)
    print(f"wrote {written}; price with it: --config-dir {options.output} cluster=measured")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import doctor_table, doctor_tree

    if options.format == "json":
        print(json.dumps(doctor_tree(), indent=1))
    else:
        _show(doctor_table())
    return 0


def _budget(options: argparse.Namespace) -> int:
    from .budget import Question, budget_tables, budget_tree

    names = [field.name for field in fields(Question) if field.name != "run"]
    question = Question(options.run_or_project, **{name: getattr(options, name) for name in names})
    if options.format == "json":
        print(json.dumps(budget_tree(question), indent=1))
    else:
        for table in budget_tables(question):
            _show(table)
    return 0


def _report(options: argparse.Namespace) -> int:
    from .report.command import write_report

    print(f"wrote {write_report(options.run_dir, options.out)}")
    return 0


def _watch(options: argparse.Namespace) -> int:
    from rich.console import Console

    from .watch import watch

    watch(options.run_dir, Console(), once=options.once)
    return 0


def _dashboard(options: argparse.Namespace) -> int:
    from .dashboard import dashboard_json, save_dashboard

    make = save_dashboard if options.save else dashboard_json
    print(make(options.overrides, options.config_dir))
    return 0


def _trace(options: argparse.Namespace) -> int:
    from .trace import open_trace, trace_table, trace_tree, write_picture

    ranks = open_trace(options.place)
    if options.svg is not None:
        write_picture(ranks, options.svg)
    if options.format == "json":
        print(json.dumps(trace_tree(ranks), indent=1))
    else:
        _show(trace_table(ranks))
    return 0


def _checkpoint(options: argparse.Namespace) -> int:
    from . import checkpoint

    as_json = options.format == "json"
    if options.action == "ls":
        listed = checkpoint.list_checkpoints(options.path)
        _show_or_print(checkpoint.checkpoints_table(listed), [asdict(each) for each in listed], as_json=as_json)
        return 0
    if options.action == "verify":
        found, damage = checkpoint.verify(options.path, options.step)
        manifest = found.manifest
        tree = {"path": str(found.path), "tensors": len(manifest.tensors), "bytes": manifest.bytes, "damage": damage}
        whole = f"{found.path}: {len(manifest.tensors):,} tensors, {manifest.bytes:,} bytes, every hash is right"
        _show_or_print("\n".join(damage) or whole, tree, as_json=as_json)
        return 1 if damage else 0
    facts, differences = checkpoint.diff(options.path, options.other, (options.step, options.other_step))
    tree = {"facts": facts, "tensors": [asdict(each) for each in differences]}
    if not as_json:
        print("\n".join(facts))
    _show_or_print(checkpoint.diff_table(differences), tree, as_json=as_json)
    return (
        0 if all(each.equal == each.tensors and not each.only_first + each.only_second for each in differences) else 1
    )


def _show_or_print(table: object, tree: object, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(tree, indent=1))
    elif isinstance(table, str):
        print(table)
    else:
        _show(table)


def _import(options: argparse.Namespace) -> int:
    from .convert import import_command

    print(f"imported to {import_command(options.source, options.target)}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from .convert import export_command

    how = options.dtype, options.rope, options.max_shard
    print(f"exported {export_command(options.path, options.step, options.directory, *how)} to {options.directory}")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from .generate import Request, acceptance, generate_text

    size = options.tokens, options.temperature, options.seed, not options.no_draft
    text, found = generate_text(Request(options.path, options.step, options.prompt, *size))
    print(options.prompt + text)
    print(acceptance(found), file=sys.stderr)
    return 0


def _data(options: argparse.Namespace) -> int:
    from .compose import compose_run

    config = compose_run(options.overrides, options.config_dir).data
    if options.action == "prepare":
        from ..trainer.data.prepare import prepare

        prepare(config, print)
    from ..trainer.data.inspect import describe, render

    print(render(describe(Path(config.prepared))))
    return 0


def _show(renderable: object) -> None:
    from rich.console import Console

    Console(markup=False).print(renderable)  # a bracket in a cell is a bracket


if __name__ == "__main__":
    main()
