"""Shape of a DeepSeek-V3 model, with the keys of Hugging Face's DeepseekV3 config (report §2, §4.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...comm.errors import Problem


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension of the rotary embedding (report §4.3)."""

    factor: float = 40.0
    """s, factor by which the context is extended; at least 1."""
    original_max_position_embeddings: int = 4096
    """Sequence length before the extension, in tokens."""
    beta_fast: float = 32.0
    """Dimensions that rotate more often than this over the original length keep their frequency; above `beta_slow`."""
    beta_slow: float = 1.0
    """Dimensions that rotate less often than this over the original length are interpolated in full; above 0."""
    mscale: float = 1.0
    """Factor m of the rotated vectors' length, 0.1 m ln s + 1; at least 0."""
    mscale_all_dim: float = 1.0
    """Factor m of the attention temperature, 0.1 m ln s + 1; at least 0."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each invalid value."""
        if self.factor < 1:
            yield Problem("factor", self.factor, "must be at least 1")
        if self.original_max_position_embeddings < 1:
            yield Problem(
                "original_max_position_embeddings", self.original_max_position_embeddings, "must be at least 1"
            )
        if not self.beta_slow > 0:
            yield Problem("beta_slow", self.beta_slow, "must be greater than 0")
        if self.beta_fast <= self.beta_slow:
            hint = f"must be greater than beta_slow = {self.beta_slow}"
            yield Problem("beta_fast", self.beta_fast, hint, ("beta_slow",))
        for name in ("mscale", "mscale_all_dim"):
            if self.__dict__[name] < 0:
                yield Problem(name, self.__dict__[name], "must be at least 0")


# Beyond these limits, planning a run alone takes hours.
MAX_WIDTH = 2**20
"""Largest side of a weight matrix: 60 times DeepSeek-V3's widest."""
MAX_VALUES = {
    "vocab_size": 2**24,
    "num_hidden_layers": 4096,
    "n_routed_experts": 2**16,
    "n_group": 2**16,
    "num_nextn_predict_layers": 64,
}
"""Largest values of the sizes that `MAX_WIDTH` does not limit."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model with multi-head latent attention, DeepSeekMoE and multi-token prediction."""

    name: str = "tiny"
    """Name of the model in logs and plots."""
    vocab_size: int = 2048
    """V, tokens of the vocabulary; equal to `data.vocab_size`."""
    hidden_size: int = 128
    """D, width of the hidden state."""
    num_hidden_layers: int = 4
    """Transformer layers of the main model, including the dense ones."""
    first_k_dense_replace: int = 1
    """Number of first layers with a dense feed-forward network instead of experts; 0 to `num_hidden_layers`."""
    num_attention_heads: int = 4
    """H, attention heads."""
    q_lora_rank: int | None = 64
    """d_c', rank of the compressed query; null: a full query projection."""
    kv_lora_rank: int = 32
    """d_c, rank of the compressed keys and values."""
    qk_nope_head_dim: int = 32
    """Width per head of queries and keys without rotation."""
    qk_rope_head_dim: int = 16
    """d_h^R, width of the rotated (decoupled) part of queries and keys; even. All heads share the rotated key."""
    v_head_dim: int = 32
    """Width per head of values."""
    intermediate_size: int = 384
    """Inner width of dense feed-forward networks."""
    moe_intermediate_size: int = 96
    """F, inner width of one expert."""
    n_routed_experts: int = 16
    """E, routed experts per layer."""
    n_shared_experts: int = 1
    """Experts that every token visits, computed as one expert of inner width `n_shared_experts` · F; 0: none."""
    num_experts_per_tok: int = 4
    """K, routed experts per token."""
    n_group: int = 4
    """Groups of consecutive experts; divides `n_routed_experts`. At full expert parallelism a group is a node."""
    topk_group: int = 2
    """M, groups that a token's experts may come from; 1 to `n_group`."""
    scoring_func: str = "sigmoid"
    """Function from router logits to affinities: `sigmoid` (V3) or `softmax` (V2)."""
    norm_topk_prob: bool = True
    """Divide the gates of a token's experts by their sum (report eq. 13)."""
    routed_scaling_factor: float = 2.5
    """Factor on the gates."""
    num_nextn_predict_layers: int = 1
    """MTP modules: further tokens that are predicted; 0: none."""
    rms_norm_eps: float = 1e-6
    """Epsilon of the RMSNorms of layers; those inside attention use 1e-6, as in the released model code."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: YarnConfig | None = None
    """YaRN context extension; null: none."""
    initializer_range: float = 0.006
    """Standard deviation of all initial weights."""

    @property
    def qk_head_dim(self) -> int:
        """Width per head of queries and keys, rotated part included."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Number of main-model layers with routed experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each invalid value."""
        yield from self._range_problems()
        if self.qk_rope_head_dim % 2:
            yield Problem("qk_rope_head_dim", self.qk_rope_head_dim, "must be even: rotary embedding rotates pairs")
        if self.first_k_dense_replace > self.num_hidden_layers:
            hint = f"must be at most num_hidden_layers = {self.num_hidden_layers}"
            yield Problem("first_k_dense_replace", self.first_k_dense_replace, hint, ("num_hidden_layers",))
        if self.scoring_func not in ("sigmoid", "softmax"):
            yield Problem("scoring_func", self.scoring_func, "must be sigmoid or softmax")
        yield from self._routing_problems()
        if self.rope_scaling is not None:
            yield from (problem.with_prefix("rope_scaling") for problem in self.rope_scaling.problems())

    def _range_problems(self) -> Iterator[Problem]:
        at_least_one = [
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
        ]
        at_least_one += ["qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size"]
        at_least_one += ["n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"]
        values = self.__dict__
        for name in at_least_one:
            if values[name] < 1:
                yield Problem(name, values[name], "must be at least 1")
        for name in ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"):
            if values[name] < 0:
                yield Problem(name, values[name], "must be at least 0")
        for name in (*at_least_one, "q_lora_rank", "n_shared_experts", "num_nextn_predict_layers"):
            most = MAX_VALUES.get(name, MAX_WIDTH)
            if (values[name] or 0) > most:
                yield Problem(name, values[name], f"must be at most {most}")
        for name in ("routed_scaling_factor", "rms_norm_eps", "rope_theta", "initializer_range"):
            if not values[name] > 0:
                yield Problem(name, values[name], "must be greater than 0")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            yield Problem("q_lora_rank", self.q_lora_rank, "must be at least 1, or null for no query compression")

    def _routing_problems(self) -> Iterator[Problem]:
        if min(self.n_routed_experts, self.num_experts_per_tok, self.n_group, self.topk_group) < 1:
            return  # `_range_problems` reports these
        if self.topk_group > self.n_group:
            hint = f"must be at most n_group = {self.n_group}"
            yield Problem("topk_group", self.topk_group, hint, ("n_group",))
        if self.n_routed_experts % self.n_group:
            yield Problem(
                "n_group",
                self.n_group,
                f"must divide n_routed_experts = {self.n_routed_experts}",
                ("n_routed_experts",),
            )
            if self.num_experts_per_tok > self.n_routed_experts:
                yield Problem(
                    "num_experts_per_tok",
                    self.num_experts_per_tok,
                    f"must be at most n_routed_experts = {self.n_routed_experts}",
                    ("n_routed_experts",),
                )
            return
        visited = min(self.topk_group, self.n_group)
        reachable = visited * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > reachable:
            where = f"the {visited} of {self.n_group} groups per token hold {reachable} experts"
            judges = ("n_routed_experts", "n_group", "topk_group")
            yield Problem(
                "num_experts_per_tok", self.num_experts_per_tok, f"must be at most {reachable}: {where}", judges
            )
