"""Full fine-tuning of language models in a notebook, with MLX."""

from fulltune_nb.blas import ensure_fast_blas

ensure_fast_blas()  # before anything imports mlx.core: afterwards is too late
