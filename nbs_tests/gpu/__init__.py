"""What needs a GPU: tests that it computes what the CPU computes, and a benchmark. On a machine with one, Apple's or NVIDIA's:

    pytest nbs_tests/gpu                     # the tests; without a GPU those are skipped that another file tries as on one
    python -m nbs_tests.gpu                  # the tests, then the benchmark's table in Markdown
    python -m nbs_tests.gpu --dry            # the benchmark at tiny sizes on whatever is there, to try it itself
    python -m nbs_tests.gpu --families       # 20 steps of every family beside the CPU's, a table; exit status 1 where one is off
"""

import fulltune_nb  # noqa: F401  before mlx, which it gives its BLAS
