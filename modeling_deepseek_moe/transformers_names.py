"""What the model takes from transformers under names that change with its releases: the cache's, forwards' keywords.

Code on the Hub outlives the release it was exported under, so this file goes along and refuses releases of
transformers that it was not tried with.
"""

import difflib
import inspect
from importlib.metadata import PackageNotFoundError, version

import transformers

OLDEST_TRIED, NEWEST_TRIED = (5, 20), (5, 24)  # minor releases of transformers that the tests ran on


def refuse_other_releases(release: str = transformers.__version__, module: str = __name__) -> None:
    """Stops code that was loaded from the Hub under a transformers that it was not tried with.

    The installed package does not: its requirements say what it takes, and it can be updated.

    Raises:
        ImportError: naming the release, those that were tried, and the way out.
    """
    is_remote_code = module.partition(".")[0] == "transformers_modules"
    if is_remote_code and not OLDEST_TRIED <= minor_release(release) <= NEWEST_TRIED:
        (major, oldest), (_, newest) = OLDEST_TRIED, NEWEST_TRIED
        raise ImportError(
            f"this model's code was tried with transformers {major}.{oldest} to {major}.{newest}, not with {release}: "
            f"pip install 'transformers>={major}.{oldest},<{major}.{newest + 1}', or load the model with a newer "
            "deepseek-moe instead of trust_remote_code=True"
        )


def minor_release(release: str) -> tuple[int, int]:
    """Major and minor number of a version, `(5, 24)` for "5.24.0"."""
    major, minor = release.split(".")[:2]
    return int(major), int(minor)


refuse_other_releases()

# Only now: another release may have moved these.
from transformers.cache_utils import Cache  # noqa: E402
from transformers.generation.continuous_batching import PagedAttentionCache  # noqa: E402
from transformers.modeling_outputs import MoeModelOutputWithPast  # noqa: E402
from transformers.utils import TransformersKwargs  # noqa: E402

CACHE_NAMES = ("past_key_values", "cache")
# transformers 5.24 renamed the cache in every signature and output, and has the model update a paged cache, which the
# attention function did before.
CACHE_NAME = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"
IS_RENAMED = CACHE_NAME == "cache"


def _name_for_peft() -> str:
    try:
        return "past_key_values" if minor_release(version("peft")) <= (0, 21) else CACHE_NAME
    except PackageNotFoundError:
        return CACHE_NAME


# PEFT's virtual prompts look for the cache in the inputs of a generation step: PEFT 0.21 by its old name only, without
# which it puts the prompt before every token.
PREPARED_CACHE_NAME = _name_for_peft()

# Keywords that a forward takes without naming them; what is not meant for this model is ignored, as transformers does.
KNOWN_KEYWORDS = frozenset(TransformersKwargs.__annotations__) | {
    # transformers' decorators of forwards
    *("return_dict", "debug_io", "debug_io_dir", "prune_layers"),
    # its loss functions; Trainer with sequence parallelism gives shifted labels
    *("shift_labels", "ignore_index"),
    # its attention functions: flash attention, and continuous batching
    *("deterministic", "block_table", "read_index", "write_index", "logits_indices", "logits_processor_args"),
    # what tokenizers, pipelines, collators and data sets leave in a batch
    *("token_type_ids", "mm_token_type_ids", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping"),
    *("overflowing_tokens", "num_truncated_tokens", "length", "assistant_masks"),
    # loops written for transformers 4; the cache itself says where it ends
    "cache_position",
    # TRL's RewardTrainer
    "margin",
    # vLLM and SGLang, around the base model, for attention functions of their own
    *("attention_instances", "forward_batch"),
}


def refuse_unknown(model, keywords: dict) -> None:
    """Refuses what a forward was given beyond its parameters and `KNOWN_KEYWORDS`; a None says nothing.

    Raises:
        TypeError: naming the keyword and the installed transformers.
    """
    for name in keywords:
        if name not in KNOWN_KEYWORDS and keywords[name] is not None:
            raise TypeError(_unknown(model, name))


def _unknown(model, name: str) -> str:
    parameters = inspect.signature(model.forward).parameters
    near = difflib.get_close_matches(name, [*parameters, *sorted(KNOWN_KEYWORDS)], n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"{type(model).__name__}.forward() got an unknown keyword {name!r} (transformers {transformers.__version__} "
        f"is installed){meant}"
    )


def one_cache(past_key_values, cache):
    """The cache that was given, under either of its names.

    Raises:
        TypeError: under both.
    """
    if past_key_values is not None and cache is not None:
        raise TypeError("past_key_values and cache are two names of the same argument: pass one of them")
    return cache if past_key_values is None else past_key_values


def name_cache(keywords: dict) -> None:
    """Puts the cache among keywords of `generate` under the name that the installed transformers takes."""
    if any(name in keywords for name in CACHE_NAMES):
        keywords[CACHE_NAME] = one_cache(*(keywords.pop(name, None) for name in CACHE_NAMES))


def is_paged(cache) -> bool:
    """Whether this is the cache of continuous batching, which is no `Cache` and knows nothing of single sequences."""
    return isinstance(cache, PagedAttentionCache)


def update_cache(cache: Cache | PagedAttentionCache, keys, values, layer_idx: int, attention_arguments: dict):
    """Keys and values of all tokens; a paged cache changes `attention_arguments` too."""
    if not is_paged(cache):
        return cache.update(keys, values, layer_idx)
    if IS_RENAMED:
        return cache.update(keys, values, layer_idx, kwargs=attention_arguments)
    attention_arguments["cache"] = cache  # the attention function updates it
    return keys, values
