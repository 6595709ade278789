"""What is asked about a row: all that head groups and cuts may depend on, asked once."""

from __future__ import annotations

from typing import Literal, NamedTuple

from verify.kernels.heads import Heads, OfHeads

SplitMode = Literal["layer", "graph"]
SPLIT_MODES: tuple[SplitMode, ...] = ("layer", "graph")
# Generations of NVIDIA GPUs, old to new; blackwell is that of 2025's desktop cards (compute capability 12).
Generation = Literal["pascal", "turing", "ampere", "ada", "hopper", "blackwell"]
GENERATIONS: tuple[Generation, ...] = ("pascal", "turing", "ampere", "ada", "hopper", "blackwell")

# Engines pad the visible keys of a call up to a multiple of this.
N_KV_PADDING = 256
# Query tokens of a call on the prefill path, as far as a policy is told: more than any that it treats apart.
PREFILL_TOKENS = 512
# Query tokens that a sequence has at most in a call of the path `several`.
MOST_SEVERAL = 16


class _RowFields(NamedTuple):
    heads: Heads  # the layer's; `kv_heads_a_gpu` is what a rule compares
    n_kv: int = 0  # keys that the row sees
    n_q: int = 1  # query tokens in the call
    cache_type: str = "f16"  # of the kernel's own cache
    sinks: bool = False  # whether heads have them
    sliding_window: bool = False  # of this layer
    alibi: bool = False  # whether heads have slopes
    key_list: bool = False  # each row has a list of the keys it sees (sparse MLA)
    sequences: int = 1  # in the call
    gpus: int = 1  # that share the layers, or each layer
    split_mode: SplitMode = "layer"  # which of these
    generation: Generation = "ada"  # of the GPUs


class RowAsked(_RowFields, OfHeads):
    """One row, as plans and policies see it: a plan says nothing that does not follow from this record.

    `Call.asked` and `Shape.asked` make it; `Plan.at` answers.
    """

    __slots__ = ()

    def of_keys(self, n_kv: int) -> RowAsked:
        """The same of a row that sees n_kv keys."""
        return self._replace(n_kv=n_kv)

    @property
    def prefill(self) -> bool:
        """Whether rows share tiles that are cut for the longest of them."""
        return self.n_q > MOST_SEVERAL

    @property
    def kv_heads_a_gpu(self) -> int:
        return max(self.kv_heads // self.gpus, 1) if self.split_mode == "graph" else self.kv_heads

    @property
    def n_kv_padded(self) -> int:
        return -(-self.n_kv // N_KV_PADDING) * N_KV_PADDING

    @property
    def sizes(self) -> tuple[int, int]:
        return self.k_size, self.v_size

    @property
    def quantised(self) -> bool:
        return self.cache_type not in ("f16", "bf16", "f32")

    def since(self, generation: Generation) -> bool:
        """Whether the GPUs are of this generation or later."""
        return GENERATIONS.index(self.generation) >= GENERATIONS.index(generation)

    @property
    def mla(self) -> bool:
        return self.k_size == 576 and self.v_size == 512
