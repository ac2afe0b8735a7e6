"""`shoestring budget`: cost of a run or project, what-ifs, and reconciliation with scheduler and invoice."""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ... import __version__
from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.units import format_gpu_hours, format_percent, format_si, format_significant, format_usd, parse_token_count
from ...trainer.ledger.checkpoint_totals import ledger_problems
from ...trainer.ledger.project import Project, ProjectReader, ProjectTotals
from ...trainer.ledger.reconcile import (
    ReconciliationLine,
    describe_invoice_price,
    read_invoice,
    read_sacct_jobs,
    reconcile_invoice,
    reconcile_jobs,
)
from ...trainer.ledger.snapshot import snapshot_problem
from ...trainer.ledger.summary import LedgerSummary, summarize_ledger, summarize_verified_ledger
from ...trainer.ledger.terms import (
    PUBLISHED_GPU_HOURS,
    PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS,
    PUBLISHED_USD_PER_GPU_HOUR,
    SNAPSHOT_FILE,
    to_gpu_hours,
    to_label,
)
from ..answers.blocks import Answer, Block, Formats, HeadlineCard, Paragraph, Quantity, TableBlock, records_table, table
from ..console import print_to_stderr
from ..report.budget import (
    cost_as_dict,
    cost_blocks,
    cost_cards,
    plural,
    published_figures,
    published_table,
    rate_card,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("run_or_project", type=Path, metavar="RUN", help="run directory, or project file")
    parser.add_argument(
        "--tokens", metavar="14.8T", help="forecast the cost of this many tokens at this run's rate; needs --gpus"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs of that forecast")
    parser.add_argument(
        "--usd-per-gpu-hour",
        type=float,
        metavar="PRICE",
        default=PUBLISHED_USD_PER_GPU_HOUR,
        help="USD per GPU-hour (default 2, as in DeepSeek's report)",
    )
    parser.add_argument("--sacct", type=Path, metavar="FILE", help="reconcile with the output of sacct")
    parser.add_argument("--invoice", type=Path, metavar="FILE", help="reconcile with an invoice, a CSV file")
    columns = "names of the invoice's columns for gpu_hours and amount"
    parser.add_argument("--invoice-columns", default="", metavar="gpu_hours=NAME,amount=NAME", help=columns)
    plan = "compare with a plan: output of `shoestring plan` or `simulate` with --format json"
    parser.add_argument("--against", type=Path, metavar="PLAN", help=plan)
    everything = "read every record of the ledger, and compare with its saved totals"
    parser.add_argument("--verify", action="store_true", help=everything)


def answer(options: argparse.Namespace) -> Answer:
    """Return the cost of the run or project that the options name.

    Raises `ConfigError` for a damaged ledger, a wrong file or a wrong option.
    """
    raise_if_any(_problems(options))
    if options.run_or_project.is_file():
        return _project_answer(Project.read(options.run_or_project), options.usd_per_gpu_hour)
    return _run_answer(options)


def _problems(options: argparse.Namespace) -> Iterator[Problem]:
    if options.run_or_project.is_file():
        for name in ("tokens", "sacct", "invoice", "against", "verify"):
            if (value := getattr(options, name)) not in (None, False):
                yield Problem(f"--{name}", str(value), "is for one run; name a run's directory, not a project")
    if (options.tokens is None) != (options.gpus is None):
        given = "--tokens" if options.gpus is None else "--gpus"
        yield Problem(given, options.tokens or options.gpus, "needs the other: --tokens 14.8T --gpus 2048")
    if options.gpus is not None and options.gpus < 1:
        yield Problem("--gpus", options.gpus, "must be at least 1")
    if not 0 <= options.usd_per_gpu_hour < math.inf:
        yield Problem("--usd-per-gpu-hour", options.usd_per_gpu_hour, "must be at least 0 and finite")


def _run_answer(options: argparse.Namespace) -> Answer:
    run_dir, price = options.run_or_project, options.usd_per_gpu_hour
    summary = _summary(run_dir, verify=options.verify)
    data = cost_as_dict(summary) | {"version": __version__, "usd": summary.gpu_hours * price}
    blocks: list[Block] = [*cost_blocks(summary)]
    if options.verify:
        data["verified_records"] = summary.num_records
        blocks.append(Paragraph(f"Verified all {summary.num_records:,} work records; {_saved(run_dir)}."))
    if options.against is not None:
        from ..report.plan_comparison import compare_with_plan, comparison_blocks  # imports torch

        comparison = compare_with_plan(run_dir, summary, options.against)
        data["against"] = asdict(comparison)
        blocks += comparison_blocks(comparison)
    if options.tokens is not None:
        tokens = parse_token_count(options.tokens, "--tokens")
        costs = _costs_of_tokens(summary, tokens, options.gpus, price)
        rate = PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS
        published = _cost(PUBLISHED_GPU_HOURS["pre_train"], rate, options.gpus, PUBLISHED_USD_PER_GPU_HOUR)
        data["what_if"], data["published_what_if"] = costs, published
        blocks.append(_what_if_table(costs, published, tokens, options.gpus))
    if options.sacct is not None:
        lines = reconcile_jobs(summary, read_sacct_jobs(options.sacct))
        _add_reconciliation(data, blocks, "scheduler and ledger", lines)
    if options.invoice is not None:
        invoice = read_invoice(options.invoice, _columns(options.invoice_columns))
        _add_reconciliation(data, blocks, "invoice and ledger", reconcile_invoice(summary, invoice))
        data["invoice"] = asdict(invoice)
        blocks.append(Paragraph(describe_invoice_price(invoice, price)))
    consumed = f"of {summary.tokens_consumed:,} consumed"
    cards = [*cost_cards(summary, price), HeadlineCard("tokens retained", f"{summary.tokens_retained:,}", "", consumed)]
    return Answer.from_blocks(f"Cost of {run_dir}", data, blocks, cards)


def _summary(run_dir: Path, *, verify: bool) -> LedgerSummary:
    """Return the run's summary; with `verify` from all records, which must agree with totals and checkpoint."""
    if verify:
        raise_if_any(_missing_for_checkpoint(run_dir))
        return summarize_verified_ledger(run_dir)
    summary, problem = summarize_ledger(run_dir), snapshot_problem(run_dir)
    if problem is not None:
        print_to_stderr(f"shoestring budget: {problem}")
    return summary


def _missing_for_checkpoint(run_dir: Path) -> Iterator[Problem]:
    """Yield records that the last checkpoint counts and the ledger lacks; a resume would be refused for them."""
    from ...trainer.checkpoint.store import CheckpointStore  # imports torch, which takes seconds

    checkpoint, _ = CheckpointStore(run_dir / "checkpoints", keep_last=1).open_last_intact()
    if checkpoint is not None and "ledger" in checkpoint.manifest.metadata:
        yield from ledger_problems(run_dir, checkpoint.manifest.metadata["ledger"])


def _saved(run_dir: Path) -> str:
    is_there = (run_dir / SNAPSHOT_FILE).exists()
    return "the saved totals agree" if is_there else "there are no saved totals to compare with"


def _costs_of_tokens(summary: LedgerSummary, tokens: float, gpus: int, price: float) -> dict[str, dict[str, float]]:
    """Return the cost of `tokens` at the rate of the last steps and of the whole run; empty before the first step.

    The rates hold for this model on this hardware only.
    """
    ms_per_token, per_trillion = summary.step_ms_per_token, summary.gpu_hours_per_trillion_tokens
    rates = {
        "its last steps, their median": None if ms_per_token is None else ms_per_token / 3.6e6,
        "everything it was charged": None if per_trillion is None else per_trillion / 1e12,
    }
    return {name: _cost(rate * tokens, rate * 1e12, gpus, price) for name, rate in rates.items() if rate is not None}


def _cost(gpu_hours: float, rate: float, gpus: int, price: float) -> dict[str, float]:
    cost = {"gpu_hours": gpu_hours, "days": gpu_hours / gpus / 24, "usd": gpu_hours * price}
    return cost | {"usd_per_gpu_hour": price, "gpu_hours_per_trillion_tokens": rate}


def _what_if_table(
    costs: Mapping[str, Mapping[str, float]], published: Mapping[str, float], tokens: float, gpus: int
) -> TableBlock:
    title = f"{format_si(tokens)} tokens on {gpus:,} GPUs, each as fast as a rank of this run"
    headings = {
        "rate": "at the rate of",
        "gpu_hours": "GPU-hours",
        "days": "days",
        "usd": "cost",
        "usd_per_gpu_hour": "per GPU-hour",
        "gpu_hours_per_trillion_tokens": "GPU-hours per trillion tokens",
    }
    formats = {
        "gpu_hours": format_gpu_hours,
        "days": "{:,.1f}".format,
        "usd": lambda usd: f"${format_significant(usd)}",
        "usd_per_gpu_hour": "${:g}".format,
        "gpu_hours_per_trillion_tokens": "{:,.0f}".format,
    }
    records = [{"rate": rate} | dict(cost) for rate, cost in costs.items()]
    reference = {"rate": "DeepSeek-V3's pre-training, 14.8 T tokens"} | dict(published)
    return records_table(title, headings, [*records, reference], formats)


def _add_reconciliation(
    data: dict[str, Any], blocks: list[Block], title: str, lines: Sequence[ReconciliationLine]
) -> None:
    """Add a table whose lines between the first and the last are the differences."""

    def hours(line: ReconciliationLine) -> Quantity:
        sign = "+" if line.is_difference and line.gpu_ms > 0 else ""
        return Quantity(line.gpu_ms, sign + format_gpu_hours(to_gpu_hours(line.gpu_ms)))

    data[title] = [{"line": line.name, "gpu_ms": line.gpu_ms} for line in lines]
    blocks.append(table(title, ("line", "GPU-hours"), [(line.name, hours(line)) for line in lines]))


def _columns(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    wrong = [key for key, sign, name in pairs if key not in ("gpu_hours", "amount") or not sign or not name]
    if wrong:
        hint = "must be of the form gpu_hours=NAME,amount=NAME"
        raise ConfigError([Problem("--invoice-columns", text, hint)])
    return {key: name for key, _, name in pairs}


def _project_answer(project: Project, price: float) -> Answer:
    """Return a project's runs, the budget left in each phase, and the published figures."""
    summaries = ProjectReader(project).summarize_runs()
    totals = ProjectTotals.from_summaries(project, summaries)
    spent = {phase: to_gpu_hours(gpu_ms) for phase, gpu_ms in totals.gpu_ms_by_phase.items()}
    tokens, whole = totals.tokens_by_phase["pre_train"], to_gpu_hours(totals.allocated_ms)
    rate = spent["pre_train"] / tokens * 1e12 if tokens else None
    published = published_figures(whole, spent, rate)
    rows = [_run_figures(run.name, summaries.get(run)) for run in project.runs]
    phases = [_phase_figures(phase, hours, project.gpu_hours.get(phase)) for phase, hours in spent.items()]
    data = {
        "version": __version__,
        "gpu_hours": whole,
        "usd": whole * price,
        "phase_gpu_hours": spent,
        "budget_gpu_hours": dict(project.gpu_hours),
        "tokens_retained": dict(totals.tokens_by_phase),
        "foreign_gpu_hours": to_gpu_hours(totals.inherited_from_others_ms),
        "runs": {str(run): summary.to_json() for run, summary in summaries.items()},
        "run_figures": rows,
        "phases": phases,
        "published": published,
    }
    cards = [HeadlineCard("GPU-hours", format_gpu_hours(whole), "", format_usd(whole, price)), rate_card(rate)]
    if totals.inherited_from_others_ms:
        inherited = format_gpu_hours(to_gpu_hours(totals.inherited_from_others_ms))
        cards.append(HeadlineCard("inherited", inherited, "GPU-hours", "from runs outside the project"))
    formats: Formats = {
        "phase": to_label,
        **dict.fromkeys(("gpu_hours", "budget", "left"), format_gpu_hours),
        **dict.fromkeys(("share", "goodput"), format_percent),
    }
    spending = {"phase": "phase", "gpu_hours": "GPU-hours"}
    of_run = {"run": "run"} | spending | {"goodput": "goodput", "tokens": "tokens retained"}
    of_phase = spending | {"budget": "budget", "left": "left", "share": "of the budget", "published": "DeepSeek-V3"}
    planned = [each for each in phases if each["budget"] is not None or each["gpu_hours"]]
    blocks = [
        records_table(f"{project.path}: {plural(len(rows), 'run')}", of_run, rows, formats),
        records_table("budget by phase", of_phase, planned, formats),
        published_table(published),
    ]
    return Answer.from_blocks(f"Cost of {project.path}", data, blocks, cards)


def _run_figures(name: str, summary: LedgerSummary | None) -> dict[str, Any]:
    """Return a run's own figures, without inherited ones; None for a run that does not exist yet."""
    if summary is None:
        return {"run": name} | dict.fromkeys(("phase", "gpu_hours", "goodput", "tokens"))
    figures = {"run": name, "phase": summary.phase, "gpu_hours": to_gpu_hours(summary.allocated_ms)}
    return figures | {"goodput": summary.goodput, "tokens": sum(summary.tokens_by_phase.values())}


def _phase_figures(phase: str, spent: float, budget: float | None) -> dict[str, Any]:
    """Return a phase's GPU-hours; `left` and `share` are of its budget, None without one."""
    left, share = (None, None) if budget is None else (budget - spent, spent / budget)
    figures = {"phase": phase, "gpu_hours": spent, "budget": budget, "left": left, "share": share}
    return figures | {"published": PUBLISHED_GPU_HOURS[phase]}
