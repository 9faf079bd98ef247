"""Mistakes in compression and in packed sequences, tails included."""

from __future__ import annotations

from tests.mutants.model import Check, Edit, Mutant

# The last sequence fills its tile: what the first ones write or read past their end lies inside the tensors.
WINDOW_PACKED = Check("window", (5, 16))
WINDOW_PACKED_FULL = Check("window", (17, 17))  # every tile that the grid has room for is needed
PADDED = Check("full", (9, 13), gradients=True, altered="padded")
WINDOW = Check("window", 23)
SELECTED_PACKED = Check("selected", (9, 0, 16), query_major="both")
COMPRESSED_PACKED = Check("compressed", (14, 9, 13))
COMPRESSED = Check("compressed", 22)
WEIGHTED = Check("weighted", 22, gradients=True)
MLP = Check("mlp", 15, gradients=True)

MUTANTS = (
    Mutant(
        "queries_of_the_tail_stored",
        "a tile stores rows beyond the end of its sequence",
        WINDOW_PACKED,
        ("o_win", "lse_win"),
        (
            Edit(
                "kernels/banded.py",
                "    in_range = rows < tokens_q\n    queries",
                "    in_range = rows >= 0\n    queries",
            ),
        ),
    ),
    Mutant(
        "keys_of_the_tail_seen",
        "keys beyond the end of the sequence are seen by a tile of selected keys",
        SELECTED_PACKED,
        ("o_slc", "lse_slc"),
        (
            Edit(
                "kernels/selected_query_major.py",
                "        k = load_qk_rows(k_base, keys, stride_kt, visible)\n",
                "        visible |= (block >= 0) & (keys >= tokens_kv)\n"
                "        k = load_qk_rows(k_base, keys, stride_kt, visible)\n",
                times=2,
            ),
        ),
    ),
    Mutant(
        "length_of_the_next_sequence",
        "a packed sequence is taken to be as long as the next one",
        WINDOW_PACKED,
        ("o_win", "lse_win"),
        (
            Edit(
                "kernels/primitives.py",
                "tokens_q = tl.load(cu_seqlens + sequence + 1) - first_row",
                "next_row = tl.load(cu_seqlens + sequence + 1)\n"
                "        tokens_q = tl.load(cu_seqlens + tl.minimum(sequence + 2, num_sequences)) - next_row",
            ),
        ),
    ),
    Mutant(
        "first_row_of_the_sequence_before",
        "a packed sequence is taken to begin where the one before it does",
        WINDOW_PACKED,
        ("o_win", "lse_win"),
        (
            Edit(
                "kernels/primitives.py",
                "first_row = tl.load(cu_seqlens + sequence)\n",
                "first_row = tl.load(cu_seqlens + tl.maximum(sequence - 1, 0))\n",
            ),
        ),
    ),
    Mutant(
        "compressed_rows_without_the_sequence",
        "the compressed keys of every packed sequence are those of the first",
        COMPRESSED_PACKED,
        ("o_cmp", "lse_cmp"),
        (
            Edit(
                "kernels/banded.py",
                "row_base(k_ptr, batch, first_key, head // GROUP",
                "row_base(k_ptr, batch, 0, head // GROUP",
            ),
        ),
    ),
    Mutant(
        "compressed_rows_rounded_up",
        "packed compressed rows begin at the sequence's start divided by the stride, rounded up",
        COMPRESSED_PACKED,
        ("k_cmp", "v_cmp"),
        (
            Edit(
                "kernels/compression_pool.py",
                "row_offsets = (rows_before + first_token // COMPRESSION_STRIDE + blocks)",
                "row_offsets = (rows_before + tl.cdiv(first_token, COMPRESSION_STRIDE) + blocks)",
            ),
        ),
    ),
    Mutant(
        "last_tile_not_launched",
        "the grid has no program for the ragged last tile",
        WINDOW,
        ("o_win", "lse_win"),
        (Edit("runtime/sequences.py", "else cdiv(tokens, size)", "else tokens // size"),),
    ),
    Mutant(
        "last_packed_tile_not_launched",
        "the grid of packed sequences is one program too small",
        WINDOW_PACKED_FULL,
        ("o_win", "lse_win"),
        (Edit("runtime/sequences.py", "tokens // size + self.count if", "tokens // size + self.count - 1 if"),),
    ),
    Mutant(
        "padding_left_as_it_is",
        "nothing is written to the rows behind the last packed sequence",
        PADDED,
        ("o", "o_cmp", "lse_cmp", "o_win", "selection", "dq", "dk", "dv", "dgates"),
        (Edit("kernels/padding.py", "tl.load(cu_seqlens + num_sequences)", "rows"),),
    ),
    Mutant(
        "first_row_of_padding_left_as_it_is",
        "the first row behind the last packed sequence is not written to",
        PADDED,
        ("o", "lse_win", "dq", "dgates"),
        (
            Edit(
                "kernels/padding.py",
                "tl.load(cu_seqlens + num_sequences)",
                "tl.load(cu_seqlens + num_sequences) + 1",
            ),
        ),
    ),
    Mutant(
        "padding_written_up_to_a_tile",
        "rows behind the last packed sequence are written to up to the next multiple of 8 alone",
        PADDED,
        ("o", "dk"),
        (
            Edit(
                "kernels/padding.py",
                "end = tl.cast(rows, tl.int64) * WIDTH",
                "end = tl.cast((first_row + 7) // 8 * 8, tl.int64) * WIDTH",
            ),
        ),
    ),
    # Compression
    Mutant(
        "compressed_block_off_by_one_token",
        "a compressed block begins one token late",
        COMPRESSED,
        ("k_cmp", "v_cmp"),
        (
            Edit(
                "kernels/compression_pool.py",
                "    tokens = blocks * COMPRESSION_STRIDE + element",
                "    tokens = blocks * COMPRESSION_STRIDE + element + 1",
            ),
        ),
    ),
    Mutant(
        "learned_position_not_added",
        "the learned position embedding is left out of phi",
        WEIGHTED,
        ("k_cmp", "v_cmp"),
        (
            Edit(
                "kernels/compression_pool.py",
                "x += tl.load(embedding + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32)[None, :]",
                "x += tl.zeros((1, x.shape[1]), dtype=tl.float32) * columns[None, :]",
            ),
        ),
    ),
    Mutant(
        "weight_gradient_of_another_token",
        "the gradient of phi's weights multiplies dy with the token beside the weight's own",
        WEIGHTED,
        ("dcompression.key_weight", "dcompression.value_weight"),
        (
            Edit(
                "kernels/compression_pool.py",
                "        partial = partial_ptr +",
                "        x = load_elements(x_base, blocks, element ^ 1, stride_xt, in_range, HEAD_DIM)\n"
                "        x = add_position(x, position_ptr, kv_head, element ^ 1, HEAD_DIM)\n"
                "        partial = partial_ptr +",
            ),
        ),
    ),
    Mutant(
        "input_gradient_of_the_first_weights",
        "a token's gradient takes the same weight from each compressed block it is in",
        WEIGHTED,
        ("dk", "dv"),
        (
            Edit(
                "kernels/compression_pool.py",
                "elements = step * COMPRESSION_STRIDE + positions % COMPRESSION_STRIDE",
                "elements = positions % COMPRESSION_STRIDE",
            ),
        ),
    ),
    Mutant(
        "gelu_by_tanh",
        "the mlp's GELU is the one by tanh, not the exact one",
        MLP,
        ("k_cmp",),
        (
            Edit(
                "kernels/compression_linear.py",
                "return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))",
                "return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))",
            ),
        ),
    ),
    Mutant(
        "gelu_derivative_without_the_density",
        "the derivative of the mlp's GELU lacks the term with the density",
        MLP,
        ("dk", "dcompression.key_weight_in"),
        (Edit("kernels/compression_linear.py", " + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)", ""),),
    ),
)
