"""What only a Linux CPU needs: a fast BLAS under MLX, exponentials, kernels of our own, streams for its cores, its allocator."""
