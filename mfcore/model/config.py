"""Configuration of a network. Stored in ``model.json``; rebuilds the network without another file."""

from dataclasses import dataclass
from typing import Literal

from mfcore.errors import UserInputError, check_range


@dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """Latents of one modality and their patches."""

    channels: int  # latent channels
    size: tuple[int, int] = (1, 1)  # latent height and width; (1, 1) for audio
    patch: tuple[int, int] = (1, 1)  # latent positions merged into one token, height and width
    # spread of a whitened latent around its mean, preconditions the output;
    # None: the output is the velocity, as in pretrained weights of other projects
    data_std: float | None = 0.5
    anchor: int = 0  # leading channels with the first frame as mean; video only
    learned_std: bool = False  # train the spread per channel and position; data_std is its initial value

    def __post_init__(self) -> None:
        if not 0 <= self.anchor <= self.channels:
            raise UserInputError(f"anchor={self.anchor}: latents have {self.channels} channels")
        if self.anchor and self.data_std is None:
            raise UserInputError("anchor is the mean of a preconditioned output: it needs a data_std")
        if self.learned_std and self.data_std is None:
            raise UserInputError("learned_std trains the spread of a preconditioned output: it needs a data_std")
        if self.size[0] % self.patch[0] or self.size[1] % self.patch[1]:
            raise UserInputError(f"latent size {self.size} is not a multiple of the patch {self.patch}")

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per latent, vertical and horizontal."""
        return self.size[0] // self.patch[0], self.size[1] // self.patch[1]

    @property
    def tokens(self) -> int:
        """Tokens per latent."""
        return self.grid[0] * self.grid[1]

    @property
    def width(self) -> int:
        """Elements of a token."""
        return self.channels * self.patch[0] * self.patch[1]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Network: one branch per modality, coupled in self-attention."""

    branches: dict[str, BranchConfig]
    dim: int  # width of a branch
    layers: int  # transformer layers
    heads: int  # attention heads
    kv_heads: int | None = None  # heads of keys and values, shared by groups of query heads; None: as many
    word_heads: int | None = None  # heads that read the transcript; None: all
    mlp_ratio: float = 4.0  # feed-forward width over dim
    text_dim: int  # width of caption and transcript embeddings
    chunk_seconds: float  # length of a chunk
    window_chunks: int  # history chunks that a chunk may attend to
    rope_seconds_scale: float = 8.0  # rotary time units per second
    word_horizon_seconds: float = 1.0  # maximum distance of attended transcript words
    local_start: bool = False  # initialize self-attention local in time and space, like word attention (layout "own")
    chunk_phase: bool = False  # embed the position of a latent in its chunk
    coupled: bool = True  # False: branches attend to themselves only (ablation)
    # learned bias on attention logits between branches, per layer, head and direction: value at the start of a joint
    # network from uni-modal parents (elsewhere 0); None: no bias
    cross_bias: float | None = None
    attention: Literal["sdpa", "flex"] = "sdpa"  # backend of masked passes on CUDA; other devices use sdpa
    layout: Literal["own", "wan"] = "own"  # wan: norms, rotations and embeddings as in Wan 2.1, to load its weights

    def __post_init__(self) -> None:
        if not self.branches:
            raise UserInputError("a model needs at least one branch: video, audio or both")
        for name, most in (("dim", 65536), ("layers", 1024), ("heads", 4096), ("text_dim", 65536)):
            check_range(name, getattr(self, name), 1, most)
        check_range("window_chunks", self.window_chunks, 1, 10**6)
        check_range("kv_heads", self.kv_heads, 1, self.heads)
        check_range("word_heads", self.word_heads, 1, self.heads)
        for name, most in (("mlp_ratio", 64), ("chunk_seconds", 60), ("rope_seconds_scale", 1000)):
            check_range(name, getattr(self, name), 0, most, above=True)
        check_range("word_horizon_seconds", self.word_horizon_seconds, 0, 3600)
        check_range("cross_bias", self.cross_bias, -100, 100)
        if self.dim % self.heads or (self.dim // self.heads) % 8:
            raise UserInputError(
                f"dim {self.dim} / heads {self.heads} must be a multiple of 8 (rotary: half time, quarters space)"
            )
        if self.heads % self.key_heads:
            raise UserInputError(f"kv_heads={self.kv_heads}: use a divisor of heads={self.heads}")
        if self.local_start and self.layout == "wan":
            raise UserInputError(
                "model.local_start=true is not available in the layout of Wan: its weights are local by training"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def has_cross_bias(self) -> bool:
        """True if attention between branches has a bias."""
        return self.cross_bias is not None and self.coupled and len(self.branches) > 1

    @property
    def transcript_heads(self) -> int:
        """Heads of the attention to the transcript."""
        return self.heads if self.word_heads is None else self.word_heads

    @property
    def mlp_width(self) -> int:
        """Hidden width of the feed-forward part."""
        return round(self.dim * self.mlp_ratio)

    @property
    def layer_norm_eps(self) -> float:
        """Number added to the variance in layer norms."""
        return 1e-6 if self.layout == "wan" else 1e-5

    @property
    def caption_extra(self) -> int:
        """Tokens before those of a caption: a null token, and in the layout of Wan a padding token."""
        return 2 if self.layout == "wan" else 1

    @property
    def level_features(self) -> int:
        """Number of Fourier features of a noise level."""
        return 256 if self.layout == "wan" else 128
