"""Which of upstream's tests cannot apply, and why. The first rule whose pattern is found in the test's id counts."""

from typing import Literal, NamedTuple


class Rule(NamedTuple):
    """`only`: the one version of transformers that the rule is for."""

    pattern: str
    group: str
    reason: str
    only: Literal["4.46", "5"] | None = None


RULES = [
    # The real vocabulary stands in for the fixture of 1000 pieces, which is no Llama vocabulary.
    Rule(
        r"LlamaTokenizationTest::test_full_tokenizer$|CommonSpmIntegrationTests",
        "fixture",
        "asserts the ids of a fixture of 1000 pieces, which is no Llama vocabulary",
    ),
    Rule(
        r"LlamaTokenizationTest::test_pretokenized_inputs$",
        "fixture",
        "transformers' own class fails it with the Llama vocabulary (pieces of several spaces)",
    ),
    Rule(
        r"test_conversion$",
        "internal",
        "compares the text of tokenizer.json with that of the converter; transformers' own class fails it here",
    ),
    Rule(r"TikTokenIntegrationTests|test_push_to_hub|test_integration_test_xnli", "hub", "needs the hub"),
    Rule(
        r"test_prepare_seq2seq_batch|test_pickle_subword|test_subword_regularization_tokenizer",
        "internal",
        "encoder-decoder, or a helper of transformers that starts a process",
    ),
    Rule(
        r"test_tokenizer_initialization_with_conflicting_key",
        "internal",
        "a guard of transformers' own against keywords that are names of methods",
    ),
    # The model.
    Rule(r"test_inherits_generation_mixin", "internal", "asks for GenerationMixin among the base classes"),
    Rule(r"test_torch_fx", "internal", "transformers.utils.fx traces PreTrainedModel objects only"),
    Rule(
        r"eager_matches_sdpa_inference_0_float16",
        "upstream",
        "upstream has no tolerance for float16 on a CPU that computes in it",
    ),
    Rule(
        r"eager_matches_sdpa_inference_1_bfloat16",
        "upstream",
        "transformers' own model fails it on this torch as often (6 of 10 runs; llama2 6 of 8)",
    ),
    Rule(
        r"test_save_load_fast_init|test_matched_shapes_have_loaded",
        "internal",
        "patches PreTrainedModel._init_weights or _initialize_weights",
    ),
    Rule(
        r"test_gradient_checkpointing_backward_compatibility",
        "internal",
        "config.gradient_checkpointing, deprecated since 4.11",
    ),
    Rule(
        r"test_sdpa_can_dispatch|test_attn_implementation_composite",
        "internal",
        "looks for the names of transformers' attention classes",
    ),
    Rule(r"test_(flash_attn|flash_attention)", "hardware", "needs a CUDA GPU with flash-attn"),
    Rule(
        r"(contrastive|group_beam|constrained_beam|diverse_beam|dola|diversity_penalty_and_num_bean_groups)",
        "not provided",
        "a decoding method that llama2 says it does not implement",
    ),
    Rule(
        r"test_pipeline_(?!text_generation|text_classification)",
        "not provided",
        "a pipeline task that llama2 does not have",
    ),
    Rule(r"test_pipeline_text_(generation|classification)", "hub", "needs the tiny models of the hub"),
    Rule(
        r"LlamaIntegrationTest::test_model_7b|CodeLlamaIntegrationTest|test_compile_static_cache",
        "hub",
        "needs gated weights",
    ),
    # Private attributes, or another generation of the interface.
    Rule(
        r"test_generation_tester_mixin_inheritance|test_tp_plan_matches_params|test_init_weights_can_init_buffers"
        r"|test_tied_weights_keys|test_can_load_from_already_mapped_keys",
        "internal",
        "private attributes of PreTrainedModel",
    ),
    Rule(
        r"test_stop_string_(embedding_vecs|matching_positions)|test_confidence_criteria",
        "internal",
        "private methods of StopStringCriteria",
    ),
    Rule(
        r"test_repetition_penalty_continuous_batching|test_continuous",
        "internal",
        "continuous batching of transformers",
    ),
    Rule(r"test_generation_mode", "internal", "GenerationConfig.get_generation_mode"),
    Rule(r"test_refuse_to_save", "by design", "llama2 never refuses to save; it warns (documented)"),
    Rule(
        r"test_model_weights_reload_no_missing_tied_weights",
        "by design",
        "a file without the weights is refused (documented), not filled with random ones",
    ),
    Rule(
        r"test_utils.py::.*(test_cfg_mixin|test_transition_scores|test_eos_token_id_int_and_list"
        r"|test_stop_sequence_stopping_criteria|test_return_unprocessed|test_max_new_tokens_decoder_only"
        r"|test_per_row_stopping)",
        "stand-in",
        "asserts values or numbers of tokens of other weights and tokenizers",
    ),
    Rule(
        r"test_utils.py::.*(encoder|vision|speech|pixel|input_features|batched_decoder_start|decoder_start_id|t5"
        r"|test_beam_search_example|double|speculative_decoding_equals|generate_input_ids_as_kwarg|generate_inputs_and)",
        "stand-in",
        "encoder-decoder or another architecture",
    ),
    Rule(
        r"GenerationConfigTest::test_validate$",
        "internal",
        "counts the characters of what transformers' logger says at two levels; the cases before pass with 4.46's test",
        "5",
    ),
    Rule(
        r"test_model_loading_old_rope_configs",
        "by design",
        "asks that `type` stays in rope_scaling beside `rope_type`, and that a factor of -999 and unknown RoPE "
        "settings are logged and used; llama2 has one spelling in Python, and refuses the others",
    ),
    Rule(
        r"test_beam_search_generate_dict_outputs_use_cache",
        "by design",
        "asks for the cache of all beams; llama2 returns that of the sequences that come back, to go on from",
    ),
    Rule(
        r"test_can_use_safetensors|test_load_save_without_tied_weights",
        "5.x only",
        "asks for sets in output_loading_info; llama2 has lists, as 4.46 asks",
        "5",
    ),
    Rule(
        r"test_assisted_decoding_(matches_greedy_search|sample)|test_prompt_lookup_decoding_matches_greedy_search",
        "4.46 only",
        "asserts the tuple caches of 4.46; llama2 returns a Cache, as 5.x does, whose suite passes here",
        "4.46",
    ),
    Rule(
        r"test_model_kwarg_assisted_decoding_decoder_only|test_generated_length_assisted_generation",
        "4.46 only",
        "asks for 20 tokens, the prompt among them, where no length is set; llama2 makes 20 new ones, as 5.x does",
        "4.46",
    ),
    Rule(
        r"test_custom_stopping_criteria_overload_error",
        "4.46 only",
        "asks that a MaxLengthCriteria beside max_length is an error; in llama2 the criterion counts, with a warning, "
        "as in 5.x",
        "4.46",
    ),
    Rule(
        r"test_generate_(from_inputs_embeds_)?with_static_cache",
        "4.46 only",
        "asks for room for the last token, which never enters a cache; llama2's static caches are as long as those of "
        "5.x, whose test passes here",
        "4.46",
    ),
    Rule(
        r"test_prepare_inputs_for_generation_decoder_llm",
        "4.46 only",
        "asks for GenerationMixin in the name of the method, for an error without cache_position and for 4D masks of "
        "static caches, which 5.x has no longer",
        "4.46",
    ),
    Rule(
        r"test_generate_compile_fullgraph_tiny",
        "not provided",
        "compiles generate() as one graph; llama2's is a loop in Python around steps that are compiled or recorded",
    ),
    Rule(
        r"test_compare_unprocessed_logit_scores",
        "by design",
        "asks for the bits of forward() from generate(); the native engine differs by 1e-6 of float32",
    ),
    Rule(
        r"heuristic_schedule$",
        "stand-in",
        "asserts how many drafts pythia-160m makes; random weights are never confident, so that each draft has one",
    ),
    Rule(
        r"test_generate_compilation_all_outputs|test_generate_compile_model_forward",
        "internal",
        "transformers' automatic compilation (_compiled_call, is_compileable)",
    ),
    Rule(r"test_default_assisted_generation", "internal", "GenerationConfig.is_assistant"),
    Rule(
        r"test_streamers.py.*test_text_streamer_decode_kwargs",
        "stand-in",
        "asserts how many tokens GPT-2's tokenizer makes",
    ),
    Rule(
        r"test_gradient_checkpointing_enable_disable|test_training_gradient_checkpointing",
        "internal",
        "asks for transformers' GradientCheckpointingLayer among the modules",
        "5",
    ),
    Rule(
        r"test_tokenizers_backend|test_integration_from_extractor|test_internal_consistency_extractor",
        "internal",
        "tokenizers-backend classes of 5.x",
        "5",
    ),
    Rule(
        r"LlamaIntegrationTest::test_special_token_special_word",
        "by design",
        "asserts the fast class's ids of legacy=False; the slow class's are kept (docs/differences.md)",
        "4.46",
    ),
    Rule(
        r"LlamaTokenizationTest::test_integration$",
        "by design",
        "asserts 5.x's spaces around special tokens; 4.46 and Meta have others (docs/differences.md)",
        "5",
    ),
    Rule(
        r"GenerationConfigTest::test_(kwarg_init|save_load_config)",
        "5.x only",
        "asserts that unset fields read None, as only 5.x has it",
        "5",
    ),
    Rule(
        r"test_new_cache_format|dict_outputs_use_cache|test_model_outputs_equivalence$",
        "4.46 only",
        "asserts the tuple caches of 4.46; llama2 returns a Cache, as 5.x does",
        "4.46",
    ),
]
