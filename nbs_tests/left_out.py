"""What `pytest --device-like MACHINE` leaves out, and why: (machines for which it is, start of the test's name, reason)."""

OTHER_PROCESSES = "processes of their own, which do not believe what this one does"
OF_THE_CPU = "speaks of the CPU by itself: its kernels, its BLAS, its allocator, what it decides there"

THE_SAME = "texts, pictures and rows: nothing in them depends on the device"
BY_A_TABLE = "asks for cosines and sines, which MLX's kernel makes on a GPU; for GPUs: models/test_rope.py"
COUNTED_LESS_WELL = "a run's peak depends on how far the host runs ahead, and is not always the measured one"
OF_MLX_LM = "mlx-lm makes a stream of its own for a device that is not there"

PEAK = "training/test_memory.py::test_what_is_counted_and_what_is_measured_beside_the_peak_of_a_run"
ALL, GPU, DARWIN = ("gpu", "darwin"), ("gpu",), ("darwin",)
LEFT_OUT = (
    (ALL, "test_browser.py", OTHER_PROCESSES),
    (ALL, "panels/test_browser", OTHER_PROCESSES),
    (ALL, "panels/test_kernels", OTHER_PROCESSES),
    (ALL, "insight/test_browser", OTHER_PROCESSES),
    (ALL, "test_notebooks.py", OTHER_PROCESSES),
    (ALL, "test_notebook_claims.py", OTHER_PROCESSES),
    (ALL, "test_demo.py", OTHER_PROCESSES),
    (ALL, "experiments/test_executors.py::test_submitit_and_dask_run_the_notebook_itself", OTHER_PROCESSES),
    (ALL, "experiments/test_search.py::test_a_search_runs_the_notebook_itself", OTHER_PROCESSES),
    (ALL, "experiments/test_search.py::test_twenty_trials_resumed_after_a_kill", OTHER_PROCESSES),
    (ALL, "training/test_parallel.py", OTHER_PROCESSES),
    (ALL, "training/test_parallel_networks.py", OTHER_PROCESSES),
    (ALL, "training/test_rank_memory.py::test_what_a_rank_needs_is_counted", OTHER_PROCESSES),
    (ALL, "test_chat_and_serve.py::test_a_served_model", OTHER_PROCESSES),
    (ALL, "test_chat_and_serve.py::test_in_a_real_terminal", OTHER_PROCESSES),
    (ALL, "test_docs.py", THE_SAME),
    (ALL, "test_layers.py", THE_SAME),
    (GPU, "data/", THE_SAME),
    (GPU, "tiny/", THE_SAME),
    (GPU, "test_fuzz.py", THE_SAME),
    (GPU, "test_svg.py", THE_SAME),
    (GPU, "models/test_stops_elsewhere.py::test_mlx_lm_stops", OF_MLX_LM),
    (GPU, "gpu/test_benchmark.py", OF_MLX_LM),
    (ALL, "cpu/", OF_THE_CPU),
    (GPU, "test_system_info.py::test_what_the_last_digits_depend_on_is_named", OF_THE_CPU),
    (GPU, "test_system_info.py::test_the_processor_that_the_blas_computes_for_is_named", OF_THE_CPU),
    (GPU, "training/test_engine.py::test_where_no_folder_for_kernels_was_found", OF_THE_CPU),
    (GPU, "test_device.py::test_the_kind_of_device", OF_THE_CPU),
    (GPU, "test_device.py::test_other_devices_have_no_such_limits[False]", OF_THE_CPU),
    (GPU, "models/test_embedding.py::test_on_a_cpu_it_is_that_of_mlx", OF_THE_CPU),
    (GPU, "models/test_mechanisms.py::test_a_dynamic_base_grows", BY_A_TABLE),
    (GPU, "models/test_mechanisms.py::test_longrope_stretches", BY_A_TABLE),
    (GPU, "models/test_mechanisms.py::test_yarn_keeps_fast_dimensions", BY_A_TABLE),
    (GPU, "models/test_decoder.py::test_masks_allow_the_past_within_the_window", OF_THE_CPU),
    (ALL, "training/test_kernels.py", OF_THE_CPU),
    (GPU, "training/test_gpu_step.py::test_without_a_window_and_packing_attention_needs_no_array", OF_THE_CPU),
    (GPU, "training/test_gpu_step.py::test_chunks_of_logits_are_few", OF_THE_CPU),
    (GPU, f"{PEAK}[256-512-4-True]", COUNTED_LESS_WELL),
    (GPU, f"{PEAK}[256-512-4-phi-sgd]", COUNTED_LESS_WELL),
    (GPU, f"{PEAK}[128-256-3-glm4_moe", COUNTED_LESS_WELL),
    (GPU, f"{PEAK}[128-256-2-mixtral", COUNTED_LESS_WELL),
    (GPU, "training/test_resuming.py::test_other_arithmetic_is_told_by_a_resume_and_by_a_restore[another BLAS]", OF_THE_CPU),
    (GPU, "training/test_resuming.py::test_other_arithmetic_is_told_by_a_resume_and_by_a_restore[another processor]", OF_THE_CPU),
    (GPU, "training/test_resuming.py::test_other_arithmetic_is_told_by_a_resume_and_by_a_restore[other kernels]", OF_THE_CPU),
    (GPU, "training/test_resuming.py::test_a_resume_with_other_threads_or_on_another_device_is_told", OF_THE_CPU),
)


def reasons(machine: str, names: list[str]) -> dict[str, str]:
    """Of the tests with these names, those that are left out on a machine such as "gpu,darwin" -> why."""
    kinds = set(machine.split(","))
    starts = [(f"nbs_tests/{start}", reason) for kinds_of, start, reason in LEFT_OUT if kinds & set(kinds_of)]
    return {name: reason for name in names for start, reason in starts if name.startswith(start)}
