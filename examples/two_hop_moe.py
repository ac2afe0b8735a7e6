"""Somebody's own MoE layer on four ranks, two "nodes" of two, with the two-hop token dispatcher under autograd.

Run it: python two_hop_moe.py. Shapes: T tokens of a rank, D width, K experts per token, R rows of this rank's experts.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from shoestring.comm.exchange import ExpertGroups, TwoHopExchange, combine, dispatch
from shoestring.launch.run.on_ranks import RankContext, run_on_ranks

NODES, RANKS_PER_NODE = 2, 2
EXPERTS, TOP_K, WIDTH, TOKENS, STEPS = 8, 2, 32, 64, 20


class MyMoE(nn.Module):
    """A residual MoE layer, of whose experts each rank holds a part."""

    def __init__(self, groups: ExpertGroups) -> None:
        super().__init__()
        self.exchange = TwoHopExchange(groups, EXPERTS)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS // groups.ep.size))

    def forward(self, tokens_TD: Tensor) -> Tensor:
        """Return the tokens plus the gated outputs of their experts, [T, D]."""
        gates_TK, experts_TK = self.router(tokens_TD).softmax(dim=-1).topk(TOP_K)
        rows_RD, gates_R, received = dispatch(self.exchange, tokens_TD, gates_TK, experts_TK)
        parts = rows_RD.split(received.rows_per_expert_L)
        out_RD = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return tokens_TD + combine(self.exchange, gates_R[:, None] * out_RD, received)


def train(context: RankContext, steps: int) -> None:
    """Teach the layer to reverse its input, as one rank of the group."""
    rank = context.rank
    mesh = init_device_mesh("cpu", (NODES, RANKS_PER_NODE), mesh_dim_names=("node", "rank"))
    groups = ExpertGroups.from_process_groups(dist.group.WORLD, mesh.get_group("node"), mesh.get_group("rank"))
    torch.manual_seed(rank)
    layer = MyMoE(groups)
    for parameter in layer.router.parameters():  # every rank has the same router; experts differ
        dist.broadcast(parameter.data, src=0)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    tokens_TD = torch.randn(TOKENS, WIDTH)
    for step in range(steps):
        optimizer.zero_grad()
        loss = (layer(tokens_TD) - tokens_TD.flip(1)).square().mean() / groups.ep.size
        loss.backward()  # an expert's gradient comes from the tokens of all ranks, the router's from this rank's
        for parameter in layer.router.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
        optimizer.step()
        dist.all_reduce(total := loss.detach().clone())
        if rank == 0 and step in (0, steps - 1):
            print(f"step {step}: loss {total:.4f}")
    if rank == 0:
        sent = layer.exchange.traffic.bytes_by_link(operation="dispatch")
        print("bytes that dispatch sent from rank 0:", {str(link): size for link, size in sent.items()})


if __name__ == "__main__":
    run_on_ranks(train, STEPS, NODES * RANKS_PER_NODE, device="cpu")
