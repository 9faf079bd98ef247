"""What a run of the whole suite leaves to the nightly one.

`pytest` without a selection runs the rest; `make nightly`, which is `pytest -m nightly`, runs these. A run of a folder,
a file or a name runs everything that it names.
"""

from __future__ import annotations

import pytest

#: Tests, and which of their cases stay in every run: so many, spread evenly, or those of these ids. What is quick, or
#: finds most, is not here.
KEPT: dict[str, dict[str, int | tuple[str, ...]]] = {
    "tests/bench/test_session.py": {
        "test_a_contender_that_died_is_not_tried_again_at_that_length_or_a_longer_one": 0,
        "test_a_contender_that_ends_its_process_is_a_row_and_the_others_are_timed_by_the_next": 1,
        "test_a_contender_that_hangs_is_ended_after_its_silence": 0,
        "test_an_operator_whose_check_did_not_end_is_not_timed": 0,
        "test_times_that_were_taken_before_a_worker_died_are_kept_once": 0,
        "test_two_contenders_that_die_in_one_task_are_both_left_out": 0,
    },
    "tests/cli/test_compile.py": {
        "test_a_spec_compiles_for_an_nvidia_and_an_amd_gpu": 0,
    },
    "tests/cli/test_interrupted.py": {
        "test_a_first_writing_that_is_interrupted_leaves_no_file_and_no_folder": 1,
        "test_an_interrupted_benchmark_ends_its_workers_and_keeps_its_journal": 0,
        "test_what_was_there_before_stays_as_it_was": 1,
    },
    "tests/cli/test_report.py": {
        "test_every_committed_record_can_be_shown": 10,
    },
    "tests/cli/test_strange_values.py": {
        "test_what_is_no_number_is_a_wrong_call": 4,
    },
    "tests/cli/test_verify.py": {
        "test_examples_are_drawn_from_their_seeds_and_one_of_them_is_repeated_by_its_words": 0,
    },
    "tests/distributed/test_context_parallel.py": {
        "test_ranks_find_what_one_process_finds": ("whole", "packed", "uneven", "without_tokens", "mean_scores"),
    },
    "tests/distributed/test_docs.py": {
        "test_two_ranks_train_the_example_s_model_as_one_does": 0,
    },
    "tests/examples/test_quality.py": {
        "test_two_processes_have_the_losses_of_one": 0,
        "test_two_steps_and_two_resumed_ones_have_the_losses_of_four": 1,
    },
    "tests/gpu/test_checks.py": {
        "test_a_soak_reports_a_failure_with_its_spec_and_goes_on": 0,
    },
    "tests/gpu/test_hopper_check.py": {
        "test_equal_gradients_have_no_fault_with_a_gate_or_without": 1,
        "test_equal_kernels_have_no_fault_whatever_is_poisoned": 1,
        "test_equal_kernels_of_selected_blocks_have_no_fault": 1,
        "test_other_places_of_nan_in_dq_are_found": 1,
    },
    "tests/gpu/test_long_and_memory.py": {
        "test_a_share_of_memory_is_held_by_one_process_and_given_back_by_one_that_is_killed": 0,
    },
    "tests/gpu/test_reporting.py": {
        "test_each_test_ends_by_itself_and_the_report_says_how": 0,
    },
    "tests/inference/test_choice.py": {
        "test_a_block_that_only_blocks_of_the_tile_before_reach_has_their_importance": 2,
        "test_a_million_tokens_have_their_best_blocks_selected": 0,
        "test_blocks_are_selected_by_importance_and_number_whatever_the_bits": 8,
        "test_drawn_importances_of_unlike_lengths_are_ranked_alike": 3,
        "test_pages_change_no_bit_of_the_choice_among_many_blocks_and_it_is_the_forwards": 0,
    },
    "tests/inference/test_docs.py": {
        "test_the_generation_loop_gives_the_same_tokens_with_and_without_pages_and_chunks": 0,
    },
    "tests/inference/test_neighbours.py": {
        "test_a_batch_entrys_bits_depend_on_no_other": 1,
        "test_a_sequences_bits_depend_on_no_other_in_the_cache": 1,
    },
    "tests/inference/test_scenarios.py": {
        "test_every_kind_of_spec_decodes_what_one_forward_computes": 4,
        "test_index_keys_are_kept_and_choose_the_same_in_one_forward_in_chunks_and_step_by_step": 1,
        "test_mean_keys_and_the_choice_have_the_same_bits_in_one_forward_in_chunks_and_step_by_step": 1,
        "test_pages_of_every_size_hold_the_same": 2,
        "test_unknown_and_equal_scores_are_ranked_in_decode_as_in_the_forward": 1,
    },
    "tests/inference/test_step.py": {
        "test_the_result_is_that_of_three_launches_and_nothing_that_was_left_shows": 3,
    },
    "tests/kernels/test_compression.py": {
        "test_a_nan_reaches_the_blocks_that_contain_it_and_no_other": 4,
        "test_batched_rows_and_gradients_agree_with_the_oracle": 5,
        "test_every_ratio_of_block_to_stride_agrees_with_the_oracle": 2,
        "test_head_dims_that_are_no_powers_of_two_agree_with_the_oracle": 1,
        "test_packed_rows_and_gradients_agree_with_the_oracle": 2,
        "test_sequences_about_as_long_as_a_block_agree_with_the_oracle": 2,
    },
    "tests/lowering/test_plan.py": {
        "test_bytes_grow_with_the_tokens_and_not_with_their_square": 14,
        "test_costs_are_never_negative_and_every_kernel_moves_something": 6,
        "test_every_default_of_a_shipped_spec_is_expected_to_fit_the_h100_it_is_for": 6,
        "test_every_kernel_has_a_default_for_every_target_out_of_its_space_and_within_its_constraints": 14,
        "test_explain_gives_floors_that_follow_from_the_devices_peaks": 6,
        "test_lowering_twice_gives_equal_programs": 8,
        "test_no_default_is_estimated_beyond_the_shared_memory_where_any_configuration_is_within": 4,
        "test_what_sees_every_block_costs_four_times_as_much_at_twice_the_tokens_and_all_else_twice": 14,
    },
    "tests/lowering/test_prediction.py": {
        "test_no_prediction_is_below_the_floor_and_longer_calls_take_longer": 4,
    },
    "tests/mutants/test_mutants.py": {
        "test_a_package_with_a_mistake_fails_its_check": 32,
        "test_an_edit_that_is_said_to_change_no_result_changes_no_bit": 2,
        "test_the_package_without_a_mistake_passes_the_same_check": 5,
    },
    "tests/operator/test_alignment.py": {
        "test_loss_and_gradients_are_those_of_the_dense_form": 3,
    },
    "tests/operator/test_empty.py": {
        "test_empty_calls_give_empty_outputs_and_zero_gradients": 8,
    },
    "tests/operator/test_hopper_backward.py": {
        "test_a_package_has_the_kernels_where_their_tiles_fit": 5,
    },
    "tests/operator/test_index_scores.py": {
        "test_each_scope_has_index_queries_of_its_own": 1,
        "test_hard_inputs_are_the_oracles": 1,
        "test_more_slots_than_a_thread_sorts_are_filled_with_scores_of_either_sign": 0,
        "test_sequences_alone_batched_and_packed_choose_the_same": 1,
        "test_the_choice_is_that_of_one_query_and_token_at_a_time": 3,
        "test_with_other_branches_everything_is_the_oracles": 1,
    },
    "tests/operator/test_joint.py": {
        "test_a_key_of_both_branches_counts_once": 2,
        "test_an_operator_with_joint_branches_has_the_properties_of_any": 1,
        "test_either_schedule_of_selection_agrees_with_the_oracle": 1,
        "test_hard_inputs_agree_with_the_oracle": 1,
        "test_joint_attention_alone_is_the_operators": 1,
        "test_operators_with_joint_branches_keep_pytorchs_rules": 0,
        "test_outputs_and_gradients_agree_with_the_oracle": 2,
        "test_prefill_and_decode_have_one_softmax": 1,
        "test_what_is_recomputed_has_the_same_bits": 1,
    },
    "tests/operator/test_kinds.py": {
        "test_a_view_with_another_sign_is_read_with_its_sign": 2,
    },
    "tests/operator/test_large_sizes.py": {
        "test_a_query_attends_to_hundreds_of_blocks": 1,
        "test_decode_is_one_forward": 1,
        "test_many_slots_are_filled_a_tile_at_a_time": 1,
        "test_outputs_gradients_and_choices_are_the_oracles": 1,
        "test_slots_and_parts_that_take_several_tiles_are_the_oracles": 1,
    },
    "tests/operator/test_local_in_window.py": {
        "test_branches_computed_anew_give_the_same_bits": 1,
        "test_every_output_and_gradient_agrees_with_the_oracle": 2,
        "test_hard_inputs_agree_with_the_oracle": 1,
    },
    "tests/operator/test_mean_scores.py": {
        "test_more_slots_than_a_thread_sorts_are_filled_with_scores_of_either_sign": 0,
        "test_outputs_and_gradients_are_those_of_attention_to_the_chosen_blocks_alone": 1,
        "test_packed_sequences_have_blocks_of_their_own": 2,
        "test_strided_queries_and_keys_need_no_copy": 0,
        "test_the_choice_is_that_of_one_query_and_block_at_a_time": 5,
        "test_the_steps_make_the_whole_and_suit_compilers": 1,
        "test_with_other_branches_everything_is_the_oracles": 1,
    },
    "tests/operator/test_padding.py": {
        "test_a_padded_batch_gives_what_it_gives_without_padding_and_nothing_for_the_padding": 4,
        "test_padding_is_nothing_by_every_schedule_of_selection": 2,
        "test_sequences_of_no_tokens_may_lie_before_the_padding": 1,
    },
    "tests/operator/test_replay.py": {
        "test_another_choice_is_what_a_spec_with_given_indices_makes_of_it": 1,
        "test_nothing_is_chosen_anew": 1,
        "test_the_operators_own_choice_gives_the_same_bits_again": 1,
        "test_the_same_bits_again_if_the_window_does_the_local_blocks": 2,
        "test_the_window_does_the_local_blocks_of_lists_that_end_with_them_alone": 2,
    },
    "tests/operator/test_rounding.py": {
        "test_a_gradient_is_the_float32_sum_of_its_parts_rounded_once": 4,
        "test_torch_converts_no_gradient_but_keys_and_values_to_which_selection_adds_last": 2,
    },
    "tests/operator/test_scopes.py": {
        "test_a_choice_is_followed_again_and_one_of_another_scope_is_refused": 1,
        "test_every_schedule_agrees": 1,
        "test_importance_is_the_sum_over_a_scope_and_then_the_sum_or_the_maximum_over_blocks": 3,
        "test_outputs_and_gradients_are_the_oracles_batched_and_packed": 1,
        "test_the_heads_of_a_scope_choose_together_by_mean_keys": 1,
    },
    "tests/operator/test_scorer_alone.py": {
        "test_choice_and_output_are_those_beside_a_branch_to_the_bit": 1,
        "test_outputs_and_gradients_are_the_oracles_batched_and_packed": 2,
        "test_the_choice_is_that_of_a_naive_version": 3,
        "test_the_lse_of_compressed_keys_is_that_of_a_branch_to_the_bit": 1,
        "test_the_steps_one_by_one_choose_as_the_operator": 1,
    },
    "tests/operator/test_sink.py": {
        "test_a_large_sink_takes_all_the_weight": 2,
        "test_a_sink_of_minus_infinity_is_no_sink_to_the_last_bit": 2,
        "test_an_operator_with_a_sink_has_the_properties_of_any": 2,
        "test_any_length_agrees_with_the_oracle": 3,
        "test_either_schedule_of_selection_has_the_sink_once": 1,
        "test_hard_inputs_agree_with_the_oracle": 2,
        "test_local_blocks_that_the_window_does_have_no_sink_of_their_own": 1,
        "test_outputs_and_gradients_agree_with_the_oracle": ("every branch", "selection alone", "each head its blocks"),
        "test_prefill_and_decode_have_the_sink": 2,
        "test_rows_behind_the_last_sequence_have_no_sink_and_no_part_in_its_gradient": 1,
        "test_selected_attention_alone_takes_the_sink_too": 1,
        "test_the_selected_branch_does_not_notice_the_sink": 1,
        "test_two_equal_calls_have_equal_bits": 1,
        "test_what_is_recomputed_has_the_same_bits": 1,
    },
    "tests/operator/test_specs.py": {
        "test_a_gradient_may_be_asked_of_one_argument_alone": 2,
        "test_batched_outputs_and_gradients_are_those_of_the_oracle": 5,
        "test_packed_sequences_are_computed_each_as_if_alone": 2,
        "test_slices_of_fused_projections_need_no_copy": 1,
    },
    "tests/operator/test_steps.py": {
        "test_the_steps_make_the_whole_and_so_do_their_gradients": 2,
    },
    "tests/operator/test_workspace.py": {
        "test_a_chunks_parts_fit_what_was_asked_for_with_less_than_a_token_to_spare": 1,
    },
    "tests/pitfalls/test_engineering.py": {
        "test_no_value_of_any_tensor_is_read_on_the_host_cu_seqlens_included": 2,
    },
    "tests/pitfalls/test_gradients.py": {
        "test_any_number_of_selected_blocks_is_used_in_forward_and_backward": 2,
        "test_gradients_are_right_for_values_wider_than_128": 1,
    },
    "tests/pitfalls/test_importance.py": {
        "test_tokens_whose_scores_are_held_a_share_at_a_time_get_the_same_blocks": 1,
    },
    "tests/pitfalls/test_masks.py": {
        "test_lengths_around_every_boundary_are_exact": 4,
        "test_queries_align_to_the_end_of_more_keys": 3,
    },
    "tests/pitfalls/test_softmax.py": {
        "test_groups_of_any_size_share_one_kv_head": 2,
    },
    "tests/pytorch/test_convert.py": {
        "test_a_dense_model_is_converted_close_to_what_it_was_and_trained_on_behind_an_interruption": 0,
    },
    "tests/pytorch/test_module.py": {
        "test_gradients_reach_every_parameter_and_the_hidden_states": 3,
        "test_prefill_and_decode_through_a_cache_give_what_the_whole_sequence_gives": 1,
    },
    "tests/pytorch/test_operators.py": {
        "test_a_differentiable_operator_passes_every_check_of_opcheck": 3,
    },
    "tests/pytorch/test_parallel.py": {
        "test_a_step_of_two_ranks_is_the_step_on_both_batches_wrapped_either_way": 0,
    },
    "tests/pytorch/test_tracing.py": {
        "test_compiled_forward_is_one_graph_compiled_as_seldom_as_pytorch_allows": 2,
        "test_operators_with_other_inputs_compile_whole": 1,
    },
    "tests/pytorch/test_transformers.py": {
        "test_a_padded_batch_is_that_of_its_sequences_alone": 2,
    },
    "tests/rendering/test_compiling.py": {
        "test_a_drawn_spec_compiles_for_a_gpu_of_each_vendor": 0,
        "test_triton_s_front_end_takes_every_kernel_of_drawn_specs": 0,
        "test_triton_s_front_end_takes_every_kernel_of_unusual_sizes": 0,
    },
    "tests/rendering/test_importing.py": {
        "test_a_later_process_runs_what_was_generated_last": 0,
    },
    "tests/rendering/test_package.py": {
        "test_bytecode_of_an_earlier_generation_is_never_run": 2,
        "test_what_is_committed_is_what_is_generated": 2,
    },
    "tests/rendering/test_sources.py": {
        "test_a_name_and_a_description_change_no_module_but_the_first": 16,
        "test_all_names_that_a_package_exports_exist": 16,
        "test_any_description_is_only_text_in_every_module": 3,
        "test_every_file_begins_with_what_made_it": 16,
        "test_every_kernel_is_launched_with_its_own_configuration": 16,
        "test_every_module_and_every_exported_function_says_what_it_does": 16,
        "test_every_module_parses_and_imports_torch_triton_the_standard_library_and_its_own_modules_only": 16,
        "test_every_spec_in_a_package_is_the_spec": 16,
        "test_every_tunable_is_a_constant_of_its_kernel_or_read_by_its_launch": 16,
        "test_kernels_and_configurations_name_each_other": 16,
        "test_no_date_no_path_of_this_machine_and_no_leftover_of_a_template": 16,
        "test_no_function_takes_more_than_fourteen_arguments": 16,
        "test_no_kernel_carries_what_bounds_a_loop_inside_it": 16,
        "test_ruff_has_nothing_to_say_of_packages_drawn_anew": 0,
        "test_the_spec_in_a_package_reads_back_as_an_equal_spec": 16,
    },
    "tests/runtime/test_runtime.py": {
        "test_a_package_carries_a_runtime_module_to_the_letter": 3,
    },
    "tests/spec/test_spec_configs.py": {
        "test_a_config_with_some_fields_changed_is_read_or_refused_by_a_field_s_name": 0,
    },
    "tests/targets/test_compile.py": {
        "test_a_block_beyond_the_devices_shared_memory_fails_there_and_only_there": 0,
        "test_an_architecture_that_shares_a_table_is_compiled_for_all_the_same": 0,
        "test_a_spec_is_generated_in_a_folder_that_is_gone_afterwards_and_says_which_passes": 0,
        "test_one_of_the_calls_may_be_compiled_alone": 0,
        "test_only_the_passes_asked_for_are_compiled": 0,
    },
    "tests/targets/test_memory.py": {
        "test_a_peak_is_what_the_passes_return_the_sums_in_float32_and_the_workspace": ("mha_16",),
        "test_branches_that_are_computed_again_are_not_held": 0,
        "test_peaks_are_below_one_and_a_half_of_the_best_peers_and_below_it_from_32k_tokens_on": ("mha_16",),
        "test_what_a_caller_asks_for_is_what_the_workspace_takes": 0,
    },
    "tests/test_examples.py": {
        "test_the_tuner_shows_what_it_would_time": 0,
    },
    "tests/test_loading.py": {
        "test_a_layer_from_a_folder_is_loaded_once_the_folder_was_imported": 0,
        "test_a_package_that_was_partly_cleared_from_the_cache_is_generated_again": 0,
    },
    "tests/test_workers.py": {
        "test_the_last_kernel_is_named_whether_triton_launches_it_or_the_package_past_triton": 1,
    },
    "tests/tools/test_context_parallel.py": {
        "test_it_measures_and_compares_ranks_with_one_process": 0,
    },
    "tests/tools/test_freeze.py": {
        "test_a_kernel_that_differs_is_named_and_the_exit_status_says_so": 0,
        "test_a_record_of_another_triton_is_refused": 0,
        "test_a_record_of_the_same_sources_compares_equal": 0,
    },
    "tests/tuning/test_faults.py": {
        "test_a_bad_candidate_costs_itself_alone": 2,
        "test_a_final_that_is_interrupted_goes_on_with_the_rounds_that_are_left": 0,
    },
    "tests/tuning/test_search.py": {
        "test_several_gpus_share_the_work": 0,
    },
    "tests/verification/test_cases.py": {
        "test_a_subtle_mistake_is_caught_by_the_default_cases": 0,
    },
    "tests/verification/test_coverage.py": {
        "test_every_tunable_of_a_package_has_several_values_in_the_default_run": 2,
    },
    "tests/verification/test_drawn_specs.py": {
        "test_a_project_asserts_that_its_package_is_right": ("module", "text"),
        "test_kernels_of_drawn_specs_have_drawn_properties": ("5",),
    },
    "tests/verification/test_gradients.py": {
        "test_chunked_gradients_equal_direct_autograd": 8,
    },
    "tests/verification/test_memory.py": {
        "test_generated_packages_allocate_no_more_than_the_bound": 3,
    },
    "tests/verification/test_tolerance.py": {
        "test_a_kernels_other_order_of_rounding_passes": 24,
        "test_honest_rounding_passes_with_room_to_spare": 12,
        "test_injected_errors_are_caught_at_every_dtype": 36,
    },
    "tests/verification/test_verify.py": {
        "test_a_right_package_passes": 3,
    },
}


def mark(items: list[pytest.Item]) -> None:
    """Mark what a whole run leaves out as `nightly`."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for file, tests in KEPT.items():
        for name, kept in tests.items():
            found = cases.get(f"{file}::{name}", [])
            for number, item in enumerate(found):
                case = item.nodeid.partition("[")[2].removesuffix("]")
                if not (case in kept if isinstance(kept, tuple) else is_kept(number, len(found), kept)):
                    item.add_marker("nightly")


def is_kept(number: int, count: int, kept: int) -> bool:
    """Whether case `number` of `count` is among the `kept` that are spread evenly over them."""
    return (number + 1) * kept // count > number * kept // count
