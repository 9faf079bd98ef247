"""What a run of the whole suite leaves to the nightly one.

`pytest` without a selection runs the rest; `make nightly`, which is `pytest -m nightly`, runs these. A run of a folder,
a file or a name runs everything that it names.
"""

from __future__ import annotations

import pytest

#: Tests, and how many of their cases, spread evenly, stay in every run. What is quick, or finds most, is not here.
KEPT = {
    "tests/bench/test_session.py": {
        "test_a_contender_that_hangs_is_ended_after_its_silence": 0,
        "test_a_contender_that_died_is_not_tried_again_at_that_length_or_a_longer_one": 0,
        "test_two_contenders_that_die_in_one_task_are_both_left_out": 0,
    },
    "tests/cli/test_verify.py": {
        "test_examples_are_drawn_from_their_seeds_and_one_of_them_is_repeated_by_its_words": 0,
    },
    "tests/distributed/test_docs.py": {
        "test_two_ranks_train_the_example_s_model_as_one_does": 0,
    },
    "tests/gpu/test_checks.py": {
        "test_a_soak_reports_a_failure_with_its_spec_and_goes_on": 0,
    },
    "tests/gpu/test_hopper_check.py": {
        "test_equal_gradients_have_no_fault_with_a_gate_or_without": 2,
        "test_equal_kernels_have_no_fault_whatever_is_poisoned": 2,
    },
    "tests/gpu/test_long_and_memory.py": {
        "test_a_share_of_memory_is_held_by_one_process_and_given_back_by_one_that_is_killed": 0,
    },
    "tests/inference/test_choice.py": {
        "test_a_million_tokens_have_their_best_blocks_selected": 0,
        "test_pages_change_no_bit_of_the_choice_among_many_blocks_and_it_is_the_forwards": 0,
    },
    "tests/inference/test_neighbours.py": {
        "test_a_batch_entrys_bits_depend_on_no_other": 1,
        "test_a_sequences_bits_depend_on_no_other_in_the_cache": 1,
    },
    "tests/inference/test_scenarios.py": {
        "test_every_kind_of_spec_decodes_what_one_forward_computes": 6,
    },
    "tests/kernels/test_compression.py": {
        "test_batched_rows_and_gradients_agree_with_the_oracle": 9,
        "test_every_ratio_of_block_to_stride_agrees_with_the_oracle": 3,
        "test_packed_rows_and_gradients_agree_with_the_oracle": 4,
        "test_sequences_about_as_long_as_a_block_agree_with_the_oracle": 3,
    },
    "tests/lowering/test_plan.py": {
        "test_costs_are_never_negative_and_every_kernel_moves_something": 12,
        "test_explain_gives_floors_that_follow_from_the_devices_peaks": 12,
        "test_no_default_is_estimated_beyond_the_shared_memory_where_any_configuration_is_within": 12,
    },
    "tests/mutants/test_mutants.py": {
        "test_a_package_with_a_mistake_fails_its_check": 26,
        "test_the_package_without_a_mistake_passes_the_same_check": 8,
    },
    "tests/operator/test_hopper.py": {
        "test_only_a_trace_for_hopper_launches_the_kernel_and_it_launches_the_ordinary_ones_too": 0,
    },
    "tests/operator/test_hopper_backward.py": {
        "test_a_package_has_the_kernels_where_their_tiles_fit": 5,
        "test_only_a_trace_for_hopper_launches_the_kernel_and_it_launches_the_ordinary_one_too": 0,
    },
    "tests/operator/test_alignment.py": {
        "test_loss_and_gradients_are_those_of_the_dense_form": 6,
    },
    "tests/operator/test_index_scores.py": {
        "test_hard_inputs_are_the_oracles": 2,
        "test_more_slots_than_a_thread_sorts_are_filled_with_scores_of_either_sign": 0,
        "test_sequences_alone_batched_and_packed_choose_the_same": 2,
        "test_the_choice_is_that_of_one_query_and_token_at_a_time": 5,
        "test_with_other_branches_everything_is_the_oracles": 2,
    },
    "tests/operator/test_joint.py": {
        "test_an_operator_with_joint_branches_has_the_properties_of_any": 1,
        "test_hard_inputs_agree_with_the_oracle": 1,
        "test_operators_with_joint_branches_keep_pytorchs_rules": 0,
        "test_outputs_and_gradients_agree_with_the_oracle": 4,
        "test_prefill_and_decode_have_one_softmax": 2,
        "test_rows_behind_the_last_sequence_are_zero_and_have_no_part_in_a_gradient": 0,
        "test_what_is_recomputed_has_the_same_bits": 1,
    },
    "tests/operator/test_large_sizes.py": {
        "test_a_query_attends_to_hundreds_of_blocks": 1,
        "test_outputs_gradients_and_choices_are_the_oracles": 2,
    },
    "tests/operator/test_local_in_window.py": {
        "test_every_output_and_gradient_agrees_with_the_oracle": 3,
    },
    "tests/operator/test_mean_scores.py": {
        "test_a_nan_key_reaches_who_sees_it_and_its_block_ranks_last_for_the_others": 0,
        "test_strided_queries_and_keys_need_no_copy": 0,
        "test_the_choice_is_that_of_one_query_and_block_at_a_time": 12,
        "test_the_local_blocks_in_the_window_and_a_recomputed_branch_change_nothing_but_rounding": 0,
        "test_more_slots_than_a_thread_sorts_are_filled_with_scores_of_either_sign": 0,
        "test_with_other_branches_everything_is_the_oracles": 2,
    },
    "tests/operator/test_replay.py": {
        "test_the_operators_own_choice_gives_the_same_bits_again": 2,
        "test_another_choice_is_what_a_spec_with_given_indices_makes_of_it": 2,
        "test_nothing_is_chosen_anew": 2,
    },
    "tests/operator/test_scopes.py": {
        "test_every_schedule_agrees": 1,
        "test_importance_is_the_sum_over_a_scope_and_then_the_sum_or_the_maximum_over_blocks": 6,
        "test_outputs_and_gradients_are_the_oracles_batched_and_packed": 3,
    },
    "tests/operator/test_sink.py": {
        "test_a_large_sink_takes_all_the_weight": 4,
        "test_an_operator_with_a_sink_has_the_properties_of_any": 4,
        "test_any_length_agrees_with_the_oracle": 3,
        "test_hard_inputs_agree_with_the_oracle": 2,
        "test_prefill_and_decode_have_the_sink": 3,
        "test_what_is_recomputed_has_the_same_bits": 3,
    },
    "tests/operator/test_specs.py": {
        "test_batched_outputs_and_gradients_are_those_of_the_oracle": 10,
    },
    "tests/pitfalls/test_engineering.py": {
        "test_no_value_of_any_tensor_is_read_on_the_host_cu_seqlens_included": 2,
    },
    "tests/pitfalls/test_importance.py": {
        "test_tokens_whose_scores_are_held_a_share_at_a_time_get_the_same_blocks": 1,
    },
    "tests/pitfalls/test_masks.py": {
        "test_lengths_around_every_boundary_are_exact": 6,
    },
    "tests/pitfalls/test_softmax.py": {
        "test_groups_of_any_size_share_one_kv_head": 5,
    },
    "tests/pytorch/test_docs.py": {
        "test_an_exported_program_is_loaded_once_its_package_was_imported": 1,
    },
    "tests/pytorch/test_operators.py": {
        "test_a_differentiable_operator_passes_every_check_of_opcheck": 3,
    },
    "tests/pytorch/test_threads.py": {
        "test_threads_that_call_a_compiled_operator_get_the_bits_of_calls_alone": 0,
    },
    "tests/rendering/test_compiling.py": {
        "test_a_drawn_spec_compiles_for_a_gpu_of_each_vendor": 0,
        "test_triton_s_front_end_takes_every_kernel_of_drawn_specs": 0,
    },
    "tests/rendering/test_importing.py": {
        "test_a_later_process_runs_what_was_generated_last": 0,
    },
    "tests/rendering/test_sources.py": {
        "test_any_description_is_only_text_in_every_module": 3,
        "test_ruff_has_nothing_to_say_of_packages_drawn_anew": 0,
    },
    "tests/runtime/test_runtime.py": {
        "test_a_package_carries_a_runtime_module_to_the_letter": 6,
    },
    "tests/spec/test_spec_configs.py": {
        "test_a_config_with_some_fields_changed_is_read_or_refused_by_a_field_s_name": 0,
    },
    "tests/targets/test_compile.py": {
        "test_a_block_beyond_the_devices_shared_memory_fails_there_and_only_there": 0,
    },
    "tests/test_loading.py": {
        "test_a_package_that_was_partly_cleared_from_the_cache_is_generated_again": 0,
    },
    "tests/tools/test_context_parallel.py": {
        "test_it_measures_and_compares_ranks_with_one_process": 0,
    },
    "tests/tools/test_freeze.py": {
        "test_a_kernel_that_differs_is_named_and_the_exit_status_says_so": 0,
        "test_a_record_of_the_same_sources_compares_equal": 0,
    },
    "tests/tuning/test_faults.py": {
        "test_a_final_that_is_interrupted_goes_on_with_the_rounds_that_are_left": 0,
        "test_two_tuners_on_one_cache_both_come_to_an_end": 0,
    },
    "tests/verification/test_cases.py": {
        "test_a_subtle_mistake_is_caught_by_the_default_cases": 0,
    },
    "tests/verification/test_memory.py": {
        "test_generated_packages_allocate_no_more_than_the_bound": 6,
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
                if not is_kept(number, len(found), kept):
                    item.add_marker("nightly")


def is_kept(number: int, count: int, kept: int) -> bool:
    """Whether case `number` of `count` is among the `kept` that are spread evenly over them."""
    return (number + 1) * kept // count > number * kept // count
