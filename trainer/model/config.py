"""The shape of a DeepSeek-V3 model, in the terms of the report (§2, §4.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...comm.errors import Problem


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension of the rotary embedding (report §4.3)."""

    factor: float = 40.0
    """s: by how much the context is extended."""
    original_length: int = 4096
    """Sequence length before the extension, in tokens."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this over the original length keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are interpolated in full."""
    mscale: float = 1.0
    """Length scale of the rotated vectors, as a factor of 0.1 ln s + 1."""
    mscale_all_dim: float = 1.0
    """The same for the attention temperature."""

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
        if self.factor < 1:
            yield Problem("factor", self.factor, "must be at least 1")
        if self.original_length < 1:
            yield Problem("original_length", self.original_length, "must be at least 1")
        if not self.beta_slow > 0:
            yield Problem("beta_slow", self.beta_slow, "must be greater than 0")
        if self.beta_fast <= self.beta_slow:
            hint = f"must be greater than beta_slow = {self.beta_slow}"
            yield Problem("beta_fast", self.beta_fast, hint, ("beta_slow",))
        for name in ("mscale", "mscale_all_dim"):
            if self.__dict__[name] < 0:
                yield Problem(name, self.__dict__[name], "must be at least 0")


MOST_WIDTH = 2**20
"""Of a matrix in either direction: 60 times DeepSeek-V3's widest."""
MOST = {"vocabulary": 2**24, "layers": 4096, "experts": 2**16, "groups": 2**16, "mtp_depth": 64}
"""What else has another limit. Beyond these sizes, planning a run alone takes hours."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Multi-head latent attention, DeepSeekMoE and multi-token prediction."""

    name: str = "tiny"
    """For logs and plots."""
    vocabulary: int = 2048
    """V."""
    hidden: int = 128
    """D."""
    layers: int = 4
    """Transformer layers of the main model, dense ones included."""
    dense_layers: int = 1
    """How many layers, from the first, have a dense feed-forward network."""
    heads: int = 4
    """H, attention heads."""
    q_lora_rank: int | None = 64
    """d_c', rank of the compressed query; null for a full query projection."""
    kv_lora_rank: int = 32
    """d_c, rank of the compressed keys and values."""
    qk_nope_head_dim: int = 32
    """Head width of queries and keys without rotation."""
    qk_rope_head_dim: int = 16
    """d_h^R, width of the rotated, decoupled part; the rotated key is shared by all heads."""
    v_head_dim: int = 32
    """Head width of values."""
    dense_ffn: int = 384
    """Inner width of dense feed-forward networks."""
    expert_ffn: int = 96
    """F, inner width of one expert."""
    experts: int = 16
    """E, routed experts of a layer."""
    shared_experts: int = 1
    """Experts that every token visits; computed as one of shared_experts · F inner width."""
    top_k: int = 4
    """K, routed experts a token visits."""
    groups: int = 4
    """Groups of consecutive experts; one group is one node at full expert parallelism."""
    top_k_groups: int = 2
    """M, groups a token may visit."""
    affinity: str = "sigmoid"
    """How router logits become affinities: `sigmoid` (V3) or `softmax` (V2)."""
    normalize_gates: bool = True
    """Whether the gates of a token's experts are divided by their sum."""
    routed_scaling: float = 2.5
    """Factor on the gates."""
    mtp_depth: int = 1
    """D, how many further tokens are predicted; 0 for none."""
    norm_eps: float = 1e-6
    """Epsilon of the RMSNorms of layers; those inside attention keep 1e-6, as in the released model code."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    yarn: YarnConfig | None = None
    """Context extension; null before it."""
    init_std: float = 0.006
    """Standard deviation of every initial weight."""

    @property
    def qk_head_dim(self) -> int:
        """Head width of queries and keys, both parts."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> int:
        """Layers of the main model with routed experts."""
        return self.layers - self.dense_layers

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
        yield from self._range_problems()
        if self.qk_rope_head_dim % 2:
            yield Problem("qk_rope_head_dim", self.qk_rope_head_dim, "must be even: rotation works on pairs")
        if self.dense_layers > self.layers:
            hint = f"must be at most layers = {self.layers}"
            yield Problem("dense_layers", self.dense_layers, hint, ("layers",))
        if self.affinity not in ("sigmoid", "softmax"):
            yield Problem("affinity", self.affinity, "must be sigmoid or softmax")
        yield from self._routing_problems()
        if self.yarn is not None:
            yield from (problem.under("yarn") for problem in self.yarn.problems())

    def _range_problems(self) -> Iterator[Problem]:
        at_least_one = ["vocabulary", "hidden", "layers", "heads", "kv_lora_rank", "qk_nope_head_dim"]
        at_least_one += ["qk_rope_head_dim", "v_head_dim", "dense_ffn", "expert_ffn"]
        at_least_one += ["experts", "top_k", "groups", "top_k_groups"]
        values = self.__dict__
        for name in at_least_one:
            if values[name] < 1:
                yield Problem(name, values[name], "must be at least 1")
        for name in ("dense_layers", "shared_experts", "mtp_depth"):
            if values[name] < 0:
                yield Problem(name, values[name], "must be at least 0")
        for name in (*at_least_one, "q_lora_rank", "shared_experts", "mtp_depth"):
            most = MOST.get(name, MOST_WIDTH)
            if (values[name] or 0) > most:
                yield Problem(name, values[name], f"must be at most {most}: no machine trains more")
        for name in ("routed_scaling", "norm_eps", "rope_theta", "init_std"):
            if not values[name] > 0:
                yield Problem(name, values[name], "must be greater than 0")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            yield Problem("q_lora_rank", self.q_lora_rank, "must be at least 1, or null for no query compression")

    def _routing_problems(self) -> Iterator[Problem]:
        if min(self.experts, self.top_k, self.groups, self.top_k_groups) < 1:
            return  # said already
        if self.top_k_groups > self.groups:
            hint = f"must be at most groups = {self.groups}"
            yield Problem("top_k_groups", self.top_k_groups, hint, ("groups",))
        if self.experts % self.groups:
            yield Problem("groups", self.groups, f"must divide experts = {self.experts}", ("experts",))
            if self.top_k > self.experts:
                yield Problem("top_k", self.top_k, f"must be at most experts = {self.experts}", ("experts",))
            return
        visited = min(self.top_k_groups, self.groups)
        reachable = visited * (self.experts // self.groups)
        if self.top_k > reachable:
            where = f"{visited} of {self.groups} groups hold {reachable} experts"
            judges = ("experts", "groups", "top_k_groups")
            yield Problem("top_k", self.top_k, f"must be at most {reachable}: {where}", judges)
