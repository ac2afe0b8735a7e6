"""Plan a run from Python: eight layers of DeepSeek-V3 on 32 H800, without a GPU.

Run it: python plan_run.py
"""

import shoestring

OVERRIDES = [
    "experiment=deepseek_v3_h800",
    "model.num_hidden_layers=8",
    "cluster.nodes=4",
    "topology.pp=4",
    "topology.edp=1",
    "topology.ep=8",
    "training.global_batch_size=128",
    "training.rampup_start_batch_size=null",
    "training.rampup_batch_size_increment=null",
    "training.rampup_tokens=0",
]

result = shoestring.plan(OVERRIDES, keep=3)
print(f"{result.search_result.considered:,} layouts considered, {result.search_result.simulated:,} simulated")
for row in (*result.best_layouts, result.configured_layout):
    forecast, layout = row.forecast, row.forecast.layout
    print(
        f"pp {layout.topology.pp} edp {layout.topology.edp} ep {layout.topology.ep} {layout.schedule:<9} "
        f"{forecast.step_seconds:.3f} s per step, {forecast.peak_bytes_with_fragmentation / 1e9:.1f} GB at the peak, "
        f"{row.pretraining_gpu_hours:,.0f} GPU-hours"
    )
