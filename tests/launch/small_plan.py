"""A search that takes seconds: eight layers of DeepSeek-V3 on four nodes."""

SMALL_PLAN = (
    *(
        "plan",
        "experiment=deepseek_v3_h800",
        "model.num_hidden_layers=8",
        "cluster.nodes=4",
        "topology.pp=4",
        "topology.edp=1",
        "topology.ep=8",
    ),
    *(
        "training.global_batch_size=128",
        "training.rampup_start_batch_size=null",
        "training.rampup_batch_size_increment=null",
        "training.rampup_tokens=0",
    ),
)
