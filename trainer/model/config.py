"""Shape of a DeepSeek-V3 model, with the keys of Hugging Face's DeepseekV3 config (report §2, §4.2)."""

from collections.abc import Iterator
from dataclasses import dataclass

from typing_extensions import override

from ...comm.errors import Problem
from ...comm.files.ranges import CheckedConfig, above, at_least, between, one_of


@dataclass(frozen=True, kw_only=True)
class YarnConfig(CheckedConfig):
    """YaRN context extension of the rotary embedding (report §4.3)."""

    factor: float = at_least(1, 40.0)
    """s, factor by which the context is extended."""
    original_max_position_embeddings: int = at_least(1, 4096)
    """Sequence length before the extension, in tokens."""
    beta_fast: float = 32.0
    """Dimensions that rotate more often than this over the original length keep their frequency; above `beta_slow`."""
    beta_slow: float = above(0, 1.0)
    """Dimensions that rotate less often than this over the original length are interpolated in full."""
    mscale: float = at_least(0, 1.0)
    """Factor m of the rotated vectors' length, 0.1 m ln s + 1."""
    mscale_all_dim: float = at_least(0, 1.0)
    """Factor m of the attention temperature, 0.1 m ln s + 1."""

    @override
    def rule_problems(self) -> Iterator[Problem]:
        if self.beta_fast <= self.beta_slow:
            hint = f"must be greater than beta_slow = {self.beta_slow}"
            yield Problem("beta_fast", self.beta_fast, hint, ("beta_slow",))


# Beyond this limit and those of the counts of layers, experts and tokens, planning a run alone takes hours.
_MAX_WIDTH = 2**20
"""Largest side of a weight matrix: 60 times DeepSeek-V3's widest."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(CheckedConfig):
    """Model with multi-head latent attention, DeepSeekMoE and multi-token prediction."""

    name: str = "tiny"
    """Name of the model in logs and plots."""
    vocab_size: int = between(1, 2**24, 2048)
    """V, rows of embedding and head, at least the tokenizer's token ids; null takes their number."""
    hidden_size: int = between(1, _MAX_WIDTH, 128)
    """D, width of the hidden state."""
    num_hidden_layers: int = between(1, 4096, 4)
    """Transformer layers of the main model, including the dense ones."""
    first_k_dense_replace: int = at_least(0, 1)
    """Number of first layers with a dense feed-forward network instead of experts; at most `num_hidden_layers`."""
    num_attention_heads: int = between(1, _MAX_WIDTH, 4)
    """H, attention heads."""
    q_lora_rank: int | None = between(1, _MAX_WIDTH, 64, null="for no query compression")
    """d_c', rank of the compressed query; null: a full query projection."""
    kv_lora_rank: int = between(1, _MAX_WIDTH, 32)
    """d_c, rank of the compressed keys and values."""
    qk_nope_head_dim: int = between(1, _MAX_WIDTH, 32)
    """Width per head of queries and keys without rotation."""
    qk_rope_head_dim: int = between(1, _MAX_WIDTH, 16)
    """d_h^R, width of the rotated (decoupled) part of queries and keys; even. All heads share the rotated key."""
    v_head_dim: int = between(1, _MAX_WIDTH, 32)
    """Width per head of values."""
    intermediate_size: int = between(1, _MAX_WIDTH, 384)
    """Inner width of dense feed-forward networks."""
    moe_intermediate_size: int = between(1, _MAX_WIDTH, 96)
    """F, inner width of one expert."""
    n_routed_experts: int = between(1, 2**16, 16)
    """E, routed experts per layer."""
    n_shared_experts: int = between(0, _MAX_WIDTH, 1)
    """Experts that every token visits, computed as one expert of inner width `n_shared_experts` · F; 0: none."""
    num_experts_per_tok: int = between(1, _MAX_WIDTH, 4)
    """K, routed experts per token."""
    n_group: int = between(1, 2**16, 4)
    """Groups of consecutive experts; divides `n_routed_experts`. At full expert parallelism a group is a node."""
    topk_group: int = between(1, _MAX_WIDTH, 2)
    """M, groups that a token's experts may come from; at most `n_group`."""
    scoring_func: str = one_of(("sigmoid", "softmax"), "sigmoid")
    """Function from router logits to affinities: `sigmoid` (V3) or `softmax` (V2)."""
    norm_topk_prob: bool = True
    """Divide the gates of a token's experts by their sum (report eq. 13)."""
    routed_scaling_factor: float = above(0, 2.5)
    """Factor on the gates."""
    num_nextn_predict_layers: int = between(0, 64, 1)
    """MTP modules: further tokens that are predicted; 0: none."""
    rms_norm_eps: float = above(0, 1e-6)
    """Epsilon of the RMSNorms of layers; those inside attention use 1e-6, as in the released model code."""
    rope_theta: float = above(0, 10000.0)
    """Base of the rotary frequencies."""
    rope_scaling: YarnConfig | None = None
    """YaRN context extension; null: none."""
    initializer_range: float = above(0, 0.006)
    """Standard deviation of all initial weights."""

    @property
    def qk_head_dim(self) -> int:
        """Width per head of queries and keys, rotated part included."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Number of main-model layers with routed experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @override
    def rule_problems(self) -> Iterator[Problem]:
        if self.qk_rope_head_dim % 2:
            yield Problem("qk_rope_head_dim", self.qk_rope_head_dim, "must be even: rotary embedding rotates pairs")
        if self.first_k_dense_replace > self.num_hidden_layers:
            hint = f"must be at most num_hidden_layers = {self.num_hidden_layers}"
            yield Problem("first_k_dense_replace", self.first_k_dense_replace, hint, ("num_hidden_layers",))
        yield from self._routing_problems()

    def _routing_problems(self) -> Iterator[Problem]:
        if min(self.n_routed_experts, self.num_experts_per_tok, self.n_group, self.topk_group) < 1:
            return  # out of their ranges
        if self.topk_group > self.n_group:
            hint = f"must be at most n_group = {self.n_group}"
            yield Problem("topk_group", self.topk_group, hint, ("n_group",))
        if self.n_routed_experts % self.n_group:
            hint = f"must divide n_routed_experts = {self.n_routed_experts}"
            yield Problem("n_group", self.n_group, hint, ("n_routed_experts",))
            if self.num_experts_per_tok > self.n_routed_experts:
                hint = f"must be at most n_routed_experts = {self.n_routed_experts}"
                yield Problem("num_experts_per_tok", self.num_experts_per_tok, hint, ("n_routed_experts",))
            return
        visited = min(self.topk_group, self.n_group)
        reachable = visited * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > reachable:
            where = f"the {visited} of {self.n_group} groups per token hold {reachable} experts"
            judges = ("n_routed_experts", "n_group", "topk_group")
            yield Problem(
                "num_experts_per_tok", self.num_experts_per_tok, f"must be at most {reachable}: {where}", judges
            )
