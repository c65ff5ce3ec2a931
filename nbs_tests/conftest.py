"""Runs before any test module is imported."""

import fulltune_nb  # noqa: F401  first of all: it gives MLX its BLAS, which is too late once a test has imported mlx
