"""What runs borrow from Trainer, accelerate, TRL, datasets and torch beyond what they document: each name, and why.

A release may move any of these without notice. `BORROWED` is checked name by name in `tests/test_borrowed_names.py`,
and under `finetune/` private names are used in this module alone. `modeling_deepseek_moe/_compat.py` is the other one.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling_deepseek_moe._compat import Borrowed

BORROWED = (
    # The Trainer's loop.
    Borrowed("transformers", "Trainer._save", "checkpoints hold what is trained", ("output_dir", "state_dict")),
    Borrowed("transformers", "Trainer._save_checkpoint", "older checkpoints go when the new one is whole"),
    Borrowed("transformers.trainer", "._tr_loss", "losses since the last log, which go on after a stop"),
    Borrowed("transformers.trainer", "._total_loss_scalar", "of these, what this call has not made"),
    Borrowed("transformers.trainer", "._globalstep_last_logged", "since when"),
    Borrowed("transformers", "Trainer._load_best_model", "the best checkpoint is as it was written"),
    Borrowed(
        "transformers",
        "Trainer._load_from_checkpoint",
        "a finished run is restored and not trained on; weights in parts",
        ("resume_from_checkpoint", "model"),
    ),
    Borrowed(
        "transformers",
        "Trainer._prepare_for_training",
        "shards a finished run's model and restores it",
        ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    ),
    Borrowed("transformers", "Trainer._issue_warnings_after_load", "what a checkpoint lacks", ("load_result",)),
    Borrowed("transformers", "Trainer._get_grad_norm", "looked at before the step", ("model", "grad_norm")),
    Borrowed("transformers", "PreTrainedModel._keys_to_ignore_on_save", "what a checkpoint may lack on resuming"),
    Borrowed("transformers.trainer_utils", "get_last_checkpoint", "where the demo's base goes on"),
    Borrowed("transformers.trainer_utils", "rotate_checkpoints", "deletes the oldest ones", ("use_mtime",)),
    Borrowed("transformers.integrations", "get_reporting_integration_callbacks", "numbers of every layer go there"),
    Borrowed("transformers.integrations.integration_utils", "INTEGRATION_TO_CALLBACK", "who can be told of a run"),
    Borrowed("transformers.integrations", "get_available_reporting_integrations", "and is installed"),
    Borrowed("transformers.quantizers.auto", "AUTO_QUANTIZATION_CONFIG_MAPPING", "which methods there are"),
    Borrowed("accelerate.accelerator", "._is_accelerate_prepared", "a model that was evaluated is prepared anew"),
    Borrowed("trl", "DPOTrainer._prepare_dataset", "rows are token ids already"),
    Borrowed("trl", "pack_dataset", "packs rows, and says so in a column `seq_lengths`"),
    # Ranks that are only imagined.
    Borrowed("torch.testing._internal.distributed.fake_pg", "FakeStore", "a process group of one process for many"),
    Borrowed("torch.distributed.tensor.debug", "_clear_sharding_prop_cache", "forgets meshes that are gone"),
    Borrowed("transformers.distributed.fsdp", "fully_shard", "experts are cut on their second dimension"),
    Borrowed("transformers", "PreTrainedModel.prepare_distribute_model", "makes the meshes", ("distributed_config",)),
    Borrowed(
        "transformers",
        "PreTrainedModel.maybe_distribute_model",
        "shards the model",
        ("model", "distributed_config", "mesh_manager"),
    ),
    Borrowed(
        "transformers.distributed.checkpoint",
        "_redistribute_state_dict",
        "weights as a distributed checkpoint can hold them",
        ("state_dict", "reference_state_dict"),
    ),
    Borrowed("transformers.core_model_loading", "revert_weight_conversion", "saves a part of a model's weights"),
    Borrowed("transformers", "Trainer._save_optimizer_and_scheduler", "of weights in parts", ("output_dir",)),
    Borrowed("transformers", "Trainer._load_optimizer_and_scheduler", "of weights in parts", ("checkpoint",)),
    # Whose source is read for `deepseek-moe keys`.
    Borrowed("transformers.training_args", "TrainingArguments", "the file of this class"),
    Borrowed("peft.tuners.lora.config", "LoraConfig", "the file of this class"),
    Borrowed("trl.trainer.dpo_config", "DPOConfig", "the file of this class"),
    # Modules in training.
    Borrowed("torch.nn.modules.module", "._non_persistent_buffers_set", "buffers that sharding is to leave whole"),
    Borrowed("torch", "_C._current_graph_task_id", "a forward pass that checkpointing repeats is not counted"),
    Borrowed("torch.nn.modules.module", "._is_replica", "copies of DataParallel are refused"),
    Borrowed("torch.distributed.distributed_c10d", "_get_default_store", "where processes say that they have ended"),
    Borrowed("torch.nn.parallel.distributed", "._ddp_params_and_buffers_to_ignore", "four-bit weights are not sent"),
    # Data, evaluation and the Hub.
    Borrowed("datasets.arrow_dataset", "._fingerprint", "tells one state of a data set of the Hub from another"),
    Borrowed("datasets.data_files", "get_data_patterns", "which files of a folder are which split", ("base_path",)),
    Borrowed("datasets.data_files", "DataFilesDict.from_patterns", "the same", ("patterns", "base_path")),
    Borrowed("lm_eval.models.huggingface", "HFLM.tok_encode", "BOS once", ("string", "add_special_tokens")),
    Borrowed("lm_eval.models.huggingface", "HFLM.tok_batch_encode", "BOS once", ("strings",)),
    Borrowed("lm_eval.models.huggingface", "HFLM.loglikelihood_rolling", "BOS once", ("requests", "disable_tqdm")),
    Borrowed("transformers.utils.chat_template_utils", "render_jinja_template", "keeps a null content"),
    Borrowed(
        "transformers.models.auto.tokenization_auto", "get_tokenizer_config", "tells whether a tokenizer is code"
    ),
    Borrowed("transformers.convert_slow_tokenizer", "TikTokenConverter", "reads a tiktoken file's ranks"),
    Borrowed("transformers.dynamic_module_utils", "get_relative_import_files", "the code that a model is pushed with"),
)


class TrainerSeams:
    """Public names for what a run changes of a Trainer; comes before it among the bases."""

    # Whether checkpoints are written by all processes, each its part, with the four methods that follow.
    is_spread = False

    def write_weights(self, checkpoint: Path) -> None:
        """Writes this process's part of the weights."""

    def read_weights(self, checkpoint: Path) -> None:
        """Gives the model in memory the weights of a checkpoint's folder."""

    def write_moments(self, checkpoint: Path) -> None:
        """Writes this process's part of the optimizer's state, and the main one the schedule's."""

    def read_moments(self, checkpoint: Path) -> None:
        """Gives optimizer and schedule their state."""

    def state_to_save(self) -> dict[str, torch.Tensor] | None:
        """What a checkpoint holds of the model; None for all of it."""
        return None

    @property
    def shards(self) -> bool:
        """Whether FSDP or DeepSpeed has the model, which they take only together with its optimizer, to train."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.cpu_ram_efficient_loading:
            prepare = self.accelerator.prepare

            def with_whole_buffers(*objects: Any, **options: Any) -> Any:
                with whole_buffers(self.model, self.args.device):
                    return prepare(*objects, **options)

            self.accelerator.prepare = with_whole_buffers

    def load_weights(self, checkpoint: str) -> None:
        """Gives the model in memory, which was not trained in this process, the weights of a checkpoint's folder."""
        if self.shards:
            self._prepare_for_training(self.state.max_steps, self.get_train_dataloader(), checkpoint)
        else:
            self._load_from_checkpoint(checkpoint)

    def prepare_anew(self) -> None:
        """Forgets that an evaluation prepared the model for itself: accelerate would not do it again, with DDP."""
        self.accelerator.free_memory()
        self.model._is_accelerate_prepared = False

    def check_loaded(self, missing: list[str], unexpected: list[str]) -> None:
        """Called when a checkpoint was loaded.

        Args:
            missing: tensors that the model has and the checkpoint has not.
            unexpected: the other way round. Of a checkpoint in several files both are a comparison of names, where
                stacked experts are called otherwise than in files.
        """

    def check_gradients(self, norm: torch.Tensor | float | None) -> None:
        """Called with the norm of the gradients that the Trainer has computed, before the optimizer's step."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.check_gradients(norm)
        return norm

    def write_checkpoint(self, write: Callable[[], None]) -> None:
        """Writes a checkpoint.

        Args:
            write: does it, and then deletes the oldest ones by `save_total_limit`.
        """
        write()

    def check_best(self, checkpoint: Path) -> None:
        """Called before the weights of the best checkpoint are taken."""

    @property
    def unlogged(self) -> tuple[torch.Tensor, int]:
        """The sum of this process's losses since the last log, and the step of that log."""
        return self._tr_loss, self._globalstep_last_logged

    def go_on_logging(self, loss: float, since: int) -> None:
        """Begins with what a run before has not logged.

        Args:
            loss: the sum of its losses since its last log.
            since: the step of that.
        """
        self._tr_loss += loss
        self._total_loss_scalar -= loss  # the mean at the end of training is of the steps of this call
        self._globalstep_last_logged = since

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        save = super()._save_checkpoint
        self.write_checkpoint(lambda: save(*args, **kwargs))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        self.check_best(best)
        if self.is_spread:
            self.read_weights(best)
        else:
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_spread:
            self.read_weights(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_spread:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.write_moments(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_spread or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.read_moments(Path(checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        self.check_loaded(load_result.missing_keys, load_result.unexpected_keys)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.is_spread:
            self.write_weights(Path(output_dir))
            return
        super()._save(output_dir, self.state_to_save() if state_dict is None else state_dict)


@contextlib.contextmanager
def whole_buffers(model: nn.Module, device: torch.device) -> Iterator[None]:
    """In it, sharding takes the model's buffers for none of its state, and all processes have the main one's.

    accelerate (1.15) spreads a model that only the main process has loaded, and stops at a buffer in its state.
    """
    kept = []
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name in module._non_persistent_buffers_set:
                continue
            whole = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            torch.distributed.broadcast(whole, src=0)
            setattr(module, name, whole)
            module._non_persistent_buffers_set.add(name)
            kept.append((module, name))
    yield
    for module, name in kept:
        module._non_persistent_buffers_set.discard(name)


def as_published(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Some of a model's weights by the names, and in the parts, in which `save_pretrained` writes them."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


@contextlib.contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """In it, one process can save what belongs to a model that is spread over several."""
    config = model.config
    spread, config.distributed_config = getattr(config, "distributed_config", None), None
    try:
        yield
    finally:
        config.distributed_config = spread


def as_checkpointed(state: dict[str, torch.Tensor], like: dict[str, torch.Tensor] | None = None) -> Any:
    """Weights cut up as a distributed checkpoint can hold them; given `like`, cut up as those again."""
    from transformers.distributed.checkpoint import _redistribute_state_dict

    return _redistribute_state_dict(state, like)


class ReadyRows:
    """Leaves rows as they are, which TRL's trainers would tokenize; comes before one among the bases."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


@contextlib.contextmanager
def imagined_ranks(count: int, rank: int = 0) -> Iterator[None]:
    """In it, this process is one of so many in a group whose collectives do nothing."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    local = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"  # which also keeps meshes from asking how many GPUs are here
    torch.distributed.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        _clear_sharding_prop_cache()  # it takes a mesh for any that is alike, also one whose groups are gone
        os.environ.pop("LOCAL_RANK")
        if local is not None:
            os.environ["LOCAL_RANK"] = local


def spreading(model_class: type[nn.Module], layout: dict[str, int]) -> Callable[[nn.Module], nn.Module]:
    """What transformers' loading does to a model without weights where a process group is there.

    Args:
        model_class: of the model.
        layout: fields of `DistributedConfig`.

    Raises:
        ValueError: there is no such layout.
        TypeError: transformers does not have it yet.
    """
    from transformers import DistributedConfig

    config, _, meshes = model_class.prepare_distribute_model(DistributedConfig(**layout))
    return lambda model: model_class.maybe_distribute_model(model, config, meshes)


@contextlib.contextmanager
def cuts_inside_experts() -> Iterator[None]:
    """In it, transformers lets FSDP cut stacked experts `[E, out, in]` on their second dimension.

    By itself it cuts them on the first, where of more ranks than experts some hold none.
    """
    from torch.distributed.tensor import Shard
    from transformers.distributed import fsdp

    plain = fsdp.fully_shard
    fsdp.fully_shard = functools.partial(plain, shard_placement_fn=lambda p: Shard(1) if p.dim() == 3 else None)
    try:
        yield
    finally:
        fsdp.fully_shard = plain


def checkpointing_argument() -> str:
    """What TrainingArguments call activation checkpointing, which transformers 5.23 renamed."""
    from transformers import TrainingArguments

    renamed = "activation_checkpointing"
    return renamed if hasattr(TrainingArguments, renamed) else "gradient_checkpointing"


def quantization_methods() -> set[str]:
    """What `quant_method` of a checkpoint may be."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return set(AUTO_QUANTIZATION_CONFIG_MAPPING)


def reporters() -> tuple[set[str], set[str]]:
    """Names of the programs that a Trainer can tell of a run, and those of them that are installed."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    installed = set(get_available_reporting_integrations())
    if importlib.util.find_spec("flytekit"):  # the one that transformers leaves out of them
        installed.add("flyte")
    return set(INTEGRATION_TO_CALLBACK), installed


def ignore_on_save(model: nn.Module, names: Iterable[str]) -> None:
    """Which tensors of the model's state a checkpoint lacks without a warning where the Trainer goes on from it."""
    model._keys_to_ignore_on_save = set(names)


def ignored_on_save(model: nn.Module) -> set[str]:
    """What `ignore_on_save` was told."""
    return set(model._keys_to_ignore_on_save or ())


def ignore_in_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Parameters that DistributedDataParallel is neither to compare nor to send."""
    model._ddp_params_and_buffers_to_ignore = list(names)


def store_of_processes() -> torch.distributed.Store:
    """Where the processes of the default group can leave each other messages."""
    return torch.distributed.distributed_c10d._get_default_store()


def is_in_backward() -> bool:
    """Whether a backward pass is running, as where checkpointing computes a forward pass again."""
    return torch._C._current_graph_task_id() != -1


def is_replica(module: nn.Module) -> bool:
    """Whether the module is a copy that `nn.DataParallel` made for one forward pass."""
    return getattr(module, "_is_replica", False)


def fingerprint(data: Any) -> str:
    """A string that changes with the rows of a data set."""
    return data._fingerprint


def files_of_splits(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by the splits that their names say, as `datasets.load_dataset` has it; empty for none."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    base = str(folder.absolute())
    try:
        patterns = get_data_patterns(base)
    except EmptyDatasetError:
        return {}
    found = DataFilesDict.from_patterns(patterns, base_path=base)
    return {str(split): [Path(path) for path in paths] for split, paths in found.items()}
