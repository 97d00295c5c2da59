"""Which numbers a recipe's keys may have: a table, and its check; no number that is none or infinite passes."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import RecipeError

_MOST = 2**31 - 1
_MOST_SEED = 2**32 - 1  # of numpy


class Range(NamedTuple):
    """The numbers from `least` to `most`.

    Attributes:
        least, most: they belong to the range themselves, but for those that the next two leave out.
        above: only what is above `least`.
        below: only what is below `most`.
        hint: what the number means, or how to say what an excluded one would have to.
        also: numbers that have a meaning of their own.
        whole_from: numbers from here on are whole.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    hint: str = ""
    also: tuple[float, ...] = ()
    whole_from: float = math.inf

    def has(self, number: float) -> bool:
        """Whether a number is in the range."""
        if number in self.also:
            return True
        if not math.isfinite(number) or (number >= self.whole_from and number != math.floor(number)):
            return False
        low = number > self.least if self.above else number >= self.least
        return low and (number < self.most if self.below else number <= self.most)

    def __str__(self) -> str:
        bounds = []
        if self.least > -math.inf:
            bounds.append(f"above {self.least:g}" if self.above else f"{self.least:g} at least")
        if self.most < math.inf:
            bounds.append(f"below {self.most:,g}" if self.below else f"{self.most:,} at most")
        if not bounds:
            bounds = ["a finite number"]
        if self.whole_from < math.inf:
            bounds.append(f"whole from {self.whole_from:g} on")
        also = "".join(f", or {number:g}" for number in self.also)
        return " and ".join(bounds) + also + (f" ({self.hint})" if self.hint else "")


_COUNT = Range(1, _MOST)
_NUMBER = Range(0, _MOST)
_POSITIVE = Range(0, 1_000_000, above=True)
_WEIGHT = Range(0, 1_000_000)
_SHARE = Range(0, 1)
_INTERVAL = Range(
    0,
    _MOST,
    above=True,
    whole_from=1,
    hint="a number of steps, or below 1 a share of all; turn it off by its strategy",
)

RANGES = {
    "eval_fraction": Range(0, 1, below=True, hint="a share of the rows; 0 holds out none"),
    "max_length": Range(2, _MOST, hint="a row needs at least 2 tokens to learn from"),
    "bias_update_speed": Range(0, 1, hint="0 freezes the bias"),
    "metric_rows": _COUNT,
    "global_batch_size": _COUNT,
    "parallel.shard": _COUNT,
    "parallel.replicate": _COUNT,
    "parallel.ep": _COUNT,
    "parallel.tp": _COUNT,
    "seed": Range(0, _MOST_SEED),
    "lora.r": Range(1, 2**16),
    "lora.lora_alpha": Range(1, _MOST, hint="0 would add nothing to the weights"),
    "lora.lora_dropout": Range(0, 1, below=True),
    "lora.rank_pattern": Range(1, 2**16),
    "lora.alpha_pattern": Range(1, _MOST, hint="0 would add nothing to the weights"),
    "lora.layers_to_transform": _NUMBER,
    "lora.layer_replication": _NUMBER,
    "lora.trainable_token_indices": _NUMBER,
    "lora.alora_invocation_tokens": _NUMBER,
    "lora.qalora_group_size": _COUNT,
    "esft.top_p": Range(0, 1, above=True, hint="a share of a layer's scores"),
    "esft.sample_tokens": _COUNT,
    "losses.aux_loss_alpha": _WEIGHT,
    "losses.device_loss_alpha": _WEIGHT,
    "losses.communication_loss_alpha": _WEIGHT,
    "losses.mtp_loss_weight": _WEIGHT,
    "losses.balance_devices": _COUNT,
    "dpo.beta": Range(0, 1_000_000, above=True, hint="0 would learn nothing"),
    "dpo.pad_to_multiple_of": _COUNT,
    "dpo.precompute_ref_batch_size": _COUNT,
    "dpo.loss_weights": _WEIGHT,
    "dpo.ld_alpha": _SHARE,
    "dpo.f_alpha_divergence_coef": _POSITIVE,
    "dpo.label_smoothing": Range(0, 0.5, below=True, hint="a share of pairs that are labelled wrongly"),
    "dpo.discopop_tau": _POSITIVE,
    "dpo.ref_model_mixup_alpha": _SHARE,
    "dpo.ref_model_sync_steps": _COUNT,
    "training.per_device_train_batch_size": _COUNT,
    "training.per_device_eval_batch_size": _COUNT,
    "training.gradient_accumulation_steps": _COUNT,
    "training.eval_accumulation_steps": _COUNT,
    "training.num_train_epochs": Range(0, 1_000_000, above=True),
    "training.max_steps": Range(1, _MOST, also=(-1,), hint="-1 leaves it to num_train_epochs"),
    "training.learning_rate": Range(0, 1000),
    "training.warmup_steps": Range(0, _MOST, whole_from=1, hint="a number of steps, or below 1 a share of all"),
    "training.warmup_ratio": _SHARE,
    "training.weight_decay": Range(0, 1000),
    "training.adam_beta1": Range(0, 1, below=True),
    "training.adam_beta2": Range(0, 1, below=True),
    "training.adam_epsilon": Range(0, 1, above=True, hint="0 divides by 0 where an expert had no token"),
    "training.max_grad_norm": Range(0, 1_000_000_000, hint="0 does not clip"),
    "training.neftune_noise_alpha": Range(0, 1000),
    "training.torch_empty_cache_steps": _COUNT,
    "training.logging_steps": _INTERVAL,
    "training.eval_steps": _INTERVAL,
    "training.save_steps": _INTERVAL,
    "training.eval_delay": _NUMBER,
    "training.save_total_limit": Range(1, _MOST, hint="null keeps all"),
    "training.data_seed": Range(0, _MOST_SEED),
    "training.dataloader_num_workers": Range(0, 1024),
    "training.dataloader_prefetch_factor": _COUNT,
    "training.ddp_bucket_cap_mb": _COUNT,
    "training.ddp_timeout": Range(1, _MOST, hint="seconds"),
    "training.local_rank": Range(-1, _MOST),
}
# Of keys that are not listed: a release of another library may have new ones, and options may be in mappings.
_ANY = Range(-(2.0**63), 2.0**63, below=True)


def check_number(key: str, value: Any) -> None:
    """Raise a RecipeError if a value of this key, or what is in it, is a number out of the key's range."""
    allowed = RANGES.get(key, _ANY)
    for number in _numbers(value):
        if not allowed.has(number):
            verb = "holds" if isinstance(value, list | dict) else "is"
            raise RecipeError(f"`{key}` {verb} {_shown(number)}: it must be {allowed}")


def _shown(number: float) -> str:
    is_long = isinstance(number, int) and abs(number) >= 10**20
    return "a number of more than 20 digits" if is_long else repr(number)


def _numbers(value: Any) -> Iterator[float]:
    if type(value) in (int, float):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
