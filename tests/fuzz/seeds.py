"""Valid files of every kind, created once; each input of the fuzzer is a damaged copy of some."""

import contextlib
import io
import json
from pathlib import Path

from shoestring.launch.cli import main
from shoestring.launch.compose import compose_run_config, config_to_yaml
from shoestring.launch.run.run_dir import write_run_config
from shoestring.tests.launch.report.recorded import config, record_run, record_trace
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.trainer.data.tokenizer import train_tokenizer
from shoestring.trainer.model.config import ModelConfig, YarnConfig
from shoestring.trainer.model.model import Model, initialize_weights

from .kinds import data_overrides

SHAPE = ModelConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=300,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    intermediate_size=16,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    initializer_range=0.2,
    rope_scaling=YarnConfig(factor=2.0, original_max_position_embeddings=32),
)
TEXT = " ".join(f"word{index * 7919 % 211}" for index in range(1500))
GPUS = ("cluster=h800", "cluster.nodes=1", "cluster.gpus_per_node=4", "training.device=auto", "recompute=deepseek_v3")
INVOICE = "gpu_hours,amount\n1.5,3.0\n2,4\n"
SACCT = "JobID|Start|End|ElapsedRaw|AllocTRES\n12|a|b|3600|cpu=2,gres/gpu=2\n12.0|a|b|3600|cpu=2\n"
PROJECT = "gpu_hours:\n  pre_train: 100\n  context_extension: 5.5\nruns:\n  - run\n"


def quietly(*arguments: str) -> str:
    """Run a command that must not fail; return its output."""
    output = io.StringIO()
    code: object = None
    with contextlib.redirect_stdout(output):
        try:
            main(arguments)
        except SystemExit as stopped:
            code = stopped.code
    assert code == 0, arguments
    return output.getvalue()


def make_seeds(root: Path, *, with_plan: bool) -> None:
    """Write corpus, prepared, checkpoints, hf, hf_sharded, run (traced) and small files. A plan takes seconds."""
    (root / "corpus").mkdir(parents=True)
    (root / "corpus" / "a.txt").write_text(TEXT)
    (root / "corpus" / "v.txt").write_text(TEXT[:400])
    lines = (json.dumps({"text": TEXT[place : place + 90], "id": place}) for place in range(0, 900, 90))
    (root / "corpus" / "w.jsonl").write_text("".join(f"{line}\n" for line in lines))
    quietly("data", "prepare", *data_overrides(root))
    tokenizer = train_tokenizer([TEXT], 300).raw
    for step in (2, 4):
        model = Model(SHAPE)
        initialize_weights(model, step)
        save_model(model, root / "saved" / "checkpoints", step, {"tokenizer.json": tokenizer})
    quietly("export", str(root / "saved"), str(root / "hf"), "--dtype", "fp8")
    quietly("export", str(root / "saved"), str(root / "hf_sharded"), "--max-shard", "10KB", "--rope", "halves")
    (root / "hf" / "generation_config.json").write_text('{"temperature": 0.6}')
    record_run(root / "run")
    record_trace(root / "run")
    write_run_config(root / "run", config_to_yaml(config(root / "run")))
    (root / "invoice.csv").write_text(INVOICE)
    (root / "sacct.txt").write_text(SACCT)
    (root / "project.yaml").write_text(PROJECT)
    (root / "plan.json").write_text("{}")
    (root / "own" / "experiment").mkdir(parents=True)
    (root / "own" / "experiment" / "mine.yaml").write_text(
        config_to_yaml(compose_run_config(["experiment=quickstart"]))
    )
    table = Path(__file__).resolve().parents[2] / "launch" / "planner" / "tables" / "h800.csv"
    (root / "table.csv").write_bytes(table.read_bytes())
    if with_plan:
        (root / "plan.json").write_text(quietly("simulate", "experiment=quickstart", *GPUS, "--format", "json"))
