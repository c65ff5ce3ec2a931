"""What `pytest --device-like MACHINE` leaves out, and why: (machines for which it is, start of the test's name, reason)."""

OTHER_PROCESSES = "processes of their own, which do not believe what this one does"
OF_THE_CPU = "speaks of the CPU by itself: its kernels, its BLAS, its allocator, what it decides there"
CPU_MEMORY = "bytes and limits of a CPU, for what is computed otherwise on a GPU; for GPUs: test_gpu_step.py, test_mac_memory.py"

THE_SAME = "texts, pictures and rows: nothing in them depends on the device"
AS_ELSEWHERE = "what training/test_gpu_step.py tries, and compiles less for it"
BY_A_TABLE = "asks for cosines and sines, which MLX's kernel makes on a GPU; for GPUs: models/test_rope.py"
PADDED = "asks for widths as they are; on a GPU they are padded"
OF_MLX_LM = "mlx-lm makes a stream of its own for a device that is not there"

ALL, GPU, DARWIN = ("gpu", "darwin"), ("gpu",), ("darwin",)
LEFT_OUT = (
    (ALL, "test_browser.py", OTHER_PROCESSES),
    (ALL, "panels/test_browser", OTHER_PROCESSES),
    (ALL, "panels/test_kernels", OTHER_PROCESSES),
    (ALL, "insight/test_browser", OTHER_PROCESSES),
    (ALL, "test_notebooks.py", OTHER_PROCESSES),
    (ALL, "test_demo.py", OTHER_PROCESSES),
    (ALL, "test_docs.py", THE_SAME),
    (ALL, "test_layers.py", THE_SAME),
    (GPU, "data/", THE_SAME),
    (GPU, "tiny/", THE_SAME),
    (GPU, "test_fuzz.py", THE_SAME),
    (GPU, "test_svg.py", THE_SAME),
    (GPU, "models/test_stops_elsewhere.py::test_mlx_lm_stops", OF_MLX_LM),
    (GPU, "gpu/test_benchmark.py", OF_MLX_LM),
    (GPU, "gpu/test_parity.py::test_every_family_is_trained_and_answers_as_on_the_cpu", AS_ELSEWHERE),
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
    (GPU, "training/test_data_of_runs.py::test_the_memory_that_is_predicted_is_that_of_the_widest_row_of_any_data_set", PADDED),
    (GPU, "training/test_data_settings.py::test_preflight_plans_for_the_rows_as_they_were_cut", PADDED),
    (GPU, "training/test_device_errors.py::test_a_step_names_the_last_checkpoint_and_changes_nothing", OF_THE_CPU),
    (GPU, "training/test_eight_bit.py::test_small_tensors_vectors_and_rows_without_a_block_keep_float32", OF_THE_CPU),
    (GPU, "training/test_engine.py::test_where_compiling_has_no_effect_an_event_says_so_and_training_goes_on[experts", OF_THE_CPU),
    (GPU, "training/test_packing.py::test_preflight_counts_the_widest_packed_row", PADDED),
    (GPU, "training/test_layerwise.py::test_a_lowest_trained_block_with_experts_gives_no_gradient_to_its_input", OF_THE_CPU),
    (GPU, "training/test_resuming.py::test_other_arithmetic_is_told_by_a_resume_and_by_a_restore", OF_THE_CPU),
    (GPU, "training/test_resuming.py::test_a_resume_with_other_threads_or_on_another_device_is_told", OF_THE_CPU),
    (GPU, "training/test_loss.py::test_logits_of_all_positions_never_exist_at_once", CPU_MEMORY),
    (GPU, "training/test_memory.py::", CPU_MEMORY),
    (GPU, "training/test_optimizers.py::test_an_update_needs_no_memory_of_its_own", CPU_MEMORY),
    (GPU, "training/test_optimizers.py::test_the_others_need_memory_for_a_part_of_the_model_only", CPU_MEMORY),
    (GPU, "training/test_update_tensors.py::test_weights_and_state_stay_in_their_memory_and_the_predicted_bytes", CPU_MEMORY),
)


def reasons(machine: str, names: list[str]) -> dict[str, str]:
    """Of the tests with these names, those that are left out on a machine such as "gpu,darwin" -> why."""
    kinds = set(machine.split(","))
    starts = [(f"nbs_tests/{start}", reason) for kinds_of, start, reason in LEFT_OUT if kinds & set(kinds_of)]
    return {name: reason for name in names for start, reason in starts if name.startswith(start)}
