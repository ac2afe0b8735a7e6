"""A run of seconds on a corpus of two short files, for tests that start real processes."""

import socket
from pathlib import Path

from shoestring.launch.compose import compose_run_config
from shoestring.trainer.data.preparation.prepare import prepare_corpus

SEQUENCE, BATCH = 32, 8
SMALL = (
    "experiment=quickstart",
    "topology.pp=1",
    "topology.ep=2",
    "model.vocab_size=512",
    "data.vocab_size=512",
    "model.num_hidden_layers=2",
    "model.hidden_size=32",
    f"training.sequence_length={SEQUENCE}",
    f"training.global_batch_size={BATCH}",
    "training.evaluate_every=0",
    "training.sample_tokens=0",
    "training.device=cpu",
    "budget.stop_at=null",  # endless runs must not be stopped for their projected cost
    "schedule.micro_batch_size=2",
)


def small_run(root: Path, steps: int) -> list[str]:
    """Return the overrides of a run of `steps` on two ranks, except its directory; prepare its data under `root`."""
    corpus = root / "corpus"
    corpus.mkdir(parents=True)
    packaged = Path(compose_run_config(["experiment=quickstart"]).data.corpus_location)
    (corpus / "hamlet.txt").write_text((packaged / "hamlet.txt").read_text()[:20000])
    (corpus / "macbeth.txt").write_text((packaged / "macbeth.txt").read_text()[:1500])
    data = [f"data.corpus={corpus}", f"data.prepared={root / 'prepared'}", "data.validation=[macbeth]"]
    prepare_corpus(compose_run_config([*SMALL, *data]).data, lambda _: None)
    return [*SMALL, *data, f"training.tokens={steps * BATCH * SEQUENCE}"]


def free_port() -> int:
    """Return a free port of this machine, for a rendezvous that starts immediately."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
