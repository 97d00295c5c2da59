"""Fine-tuning with transformers' Trainer and PEFT: what users need, by name; README.md says which wing holds what.

Importing this imports neither torch nor transformers: a function comes when it is asked for.
"""

from modeling_deepseek_moe.lazy import hand_out

_HOMES = {
    "BalanceExperts": ".model.balance",
    "ChosenExperts": ".model.chosen_experts",
    "Collator": ".data.batches",
    "Conversation": ".evaluate.conversation",
    "EsftOptions": ".recipe.schema",
    "LoadCounter": ".model.counting",
    "Recipe": ".recipe.schema",
    "RecipeError": ".errors",
    "SaveSharded": ".model.resume",
    "UserError": ".errors",
    "dump_recipe": ".recipe.load",
    "evaluate_model": ".evaluate.measure",
    "load_data": ".data.rows",
    "load_esft_adapter": ".model.esft_adapter",
    "load_for_use": ".model.use",
    "load_recipe": ".recipe.load",
    "lora_config": ".model.lora",
    "make_recipe": ".recipe.load",
    "plan_facts": ".plan.report",
    "push_run": ".hub.push",
    "put_adapter": ".model.use",
    "release": ".model.chosen_experts",
    "report_experts": ".experts.report",
    "run": ".train.one_run",
    "save_esft_adapter": ".model.esft_adapter",
    "score_data": ".experts.score_data",
    "select_from": ".experts.score_data",
    "train_chosen": ".model.chosen_experts",
    "training_memory": ".plan.memory",
    "watch_experts": ".experts.watch",
}
__all__ = list(_HOMES)
__getattr__, __dir__ = hand_out(__name__, _HOMES)
