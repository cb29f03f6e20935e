"""Fine-tune Qwen3 into a personal ranker with MLX: SFT, then DMPO, then pairwise ranking evaluation."""

__version__ = "0.1.0"
