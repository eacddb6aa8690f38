"""Which tests hold each row of the input faults, and that they exist."""

import ast
from pathlib import Path

import pytest

ROWS = {
    "i01_torn_last_line": "test_read.test_every_prefix_of_a_file_gives_its_whole_lines_or_an_error",
    "i02_encodings": "test_read.test_other_encodings_are_bad_utf8",
    "i03_lone_surrogates": "test_read.test_bad_syntax_is_bad_json",
    "i04_control_characters": "test_read.test_text_reaches_the_tokenizer_byte_by_byte",
    "i05_line_without_end": "test_read.test_a_line_without_end_costs_little_memory",
    "i06_duplicate_keys": "test_read.test_a_key_twice_is_refused_at_any_depth",
    "i07_nesting": "test_read.test_deep_nesting_is_a_limit_and_no_signal",
    "i08_types": "test_read.test_counts_add_up_for_any_json",
    "i09_empty_completions": "test_read.test_a_bad_row_has_one_reason_and_field",
    "i10_identical_pairs": "test_read.test_a_bad_row_has_one_reason_and_field",
    "i11_truncated_away": "test_pairs.test_truncation_keeps_one_prompt_for_both_sides",
    "i12_lines": "test_read.test_line_ends_blank_lines_and_one_bom_are_no_rows",
    "i13_gzip": "test_read.test_every_truncation_of_a_gzip_file_is_raised",
    "i14_bombs_and_windows": "test_zstd.test_bombs_are_limits_in_little_memory",
    "i15_parquet": "test_sources.test_damaged_files_are_typed_errors",
    "i16_changed_files": "test_sources.test_a_file_that_changes_while_it_is_read_is_refused",
    "i17_special_files": "test_read.test_files_that_cannot_be_read",
    "i18_globs": "test_read.test_globs_are_sorted_without_hidden_files_and_no_file_comes_twice",
    "i19_names_in_manifests": "test_sources.test_names_in_a_saved_folder_stay_inside",
}


@pytest.mark.parametrize("test", ROWS.values(), ids=ROWS)
def test_each_row_has_its_test(test):
    module, name = test.split(".")
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
