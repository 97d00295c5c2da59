"""Expert-Specialized Fine-Tuning: which experts serve a task, and which of them to train (ESFT, FACTS 5).

A file of scores, as DeepSeek publishes it, has two figures of four decimals for every routed expert, by layer index:

    {"token_scores": {"1": {"0": 0.0101, ...}, ...}, "gate_scores": {"1": {"0": 0.0074, ...}, ...}}

    token   share of the tokens' choices that went to the expert; a layer sums up to 1
    gate    its gate value, 0 where it was not chosen, mean of all tokens; a layer sums up to at most 1. The gate value
            is the routing weight without `routed_scaling_factor`, in sigmoid routers after their normalisation.

Tokens weigh alike, whatever the length of their sequence, as in the scores that DeepSeek publishes; the paper's text
averages the sequences instead (FACTS 5.5). In each layer the best experts, as many as their scores need to sum up to
`top_p`, are trained. `expert_cfg.json` names them, best first:

    {"experts": {"1": [8, 26, 55, 6, 20], ...}, "shared_experts": false, "non_expert_modules": false}
"""

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig
from modeling_deepseek_moe.conversion.adapters.esft import check_expert_cfg, read_expert_cfg

from ..errors import UserError
from .routing import RoutingTotals

SCORES, CONFIG = "expert_scores.json", "expert_cfg.json"
_DECIMALS = 4

Scores = dict[str, dict[str, dict[str, float]]]


def esft_scores(totals: RoutingTotals, gate_scale: float = 1.0) -> Scores:
    """Both scores of every expert, rounded, in the published format.

    Args:
        totals: what the routers did with the task's tokens.
        gate_scale: the factor in the routing weights that is no part of the gate value.
    """
    gates = totals.weights / (gate_scale * max(totals.tokens, 1))
    return {
        kind: {
            str(layer): {str(expert): round(score, _DECIMALS) for expert, score in enumerate(row)}
            for layer, row in zip(totals.layers, rows.tolist(), strict=True)
        }
        for kind, rows in (("token_scores", totals.shares), ("gate_scores", gates))
    }


def select_experts(scores: Scores, score: Literal["token", "gate"], top_p: float) -> dict[str, list[int]]:
    """The fewest experts of each layer whose scores sum up to `top_p`, the best first; of equals the first listed.

    Raises:
        UserError: `top_p` is no share, or more than the scores of a layer sum up to.
    """
    if not 0 < top_p <= 1:
        raise UserError(f"`top_p` is {top_p}: it is a share of a layer's scores, above 0 and at most 1")
    # Whole numbers: sums of rounded decimals must reach `top_p` where they do on paper.
    unit = 10**_DECIMALS
    wanted = Decimal(str(top_p)) * unit
    chosen: dict[str, list[int]] = {}
    for layer, of_expert in sorted(scores[f"{score}_scores"].items(), key=lambda item: int(item[0])):
        rounded = {int(expert): round(value * unit) for expert, value in of_expert.items()}
        # Each score may have lost half a unit to rounding.
        if (total := sum(rounded.values())) + len(rounded) / 2 < wanted:
            raise UserError(
                f"the {score} scores of layer {layer} sum up to {total / unit:.2f}, less than top_p={top_p}: lower it"
            )
        chosen[layer], reached = [], 0
        for expert in sorted(rounded, key=lambda expert: -rounded[expert]):
            chosen[layer].append(expert)
            reached += rounded[expert]
            if reached >= wanted:
                break
    return chosen


def expert_cfg(
    scores: Scores,
    score: Literal["token", "gate"],
    top_p: float,
    shared_experts: bool = False,
    non_expert_modules: bool = False,
) -> dict[str, Any]:
    """What `expert_cfg.json` holds for a selection."""
    experts = select_experts(scores, score, top_p)
    return {"experts": experts, "shared_experts": shared_experts, "non_expert_modules": non_expert_modules}


def read_scores(path: str | Path) -> Scores:
    """A file of scores, checked.

    Raises:
        UserError: it cannot be read or is no such file; one line says what is wrong.
    """
    scores = _read_json(Path(path))
    for kind in ("token_scores", "gate_scores"):
        layers = scores.get(kind) if isinstance(scores, dict) else None
        if not isinstance(layers, dict) or not layers:
            raise UserError(f'{path} is no file of ESFT scores: it lacks "{kind}" by layer')
        for layer, experts in layers.items():
            if not layer.isdecimal():
                raise UserError(f"{path}: {kind} has a layer {layer!r}, which is no number")
            if not isinstance(experts, dict) or sorted(experts) != sorted(map(str, range(len(experts)))):
                raise UserError(f"{path}: {kind} of layer {layer} are not those of experts 0, 1, 2 and so on")
            wrong = next((expert for expert, value in experts.items() if not _is_share(value)), None)
            if wrong is not None:
                raise UserError(
                    f"{path}: {kind} of layer {layer}, expert {wrong} is {experts[wrong]!r}, not a share from 0 to 1"
                )
    return {kind: scores[kind] for kind in ("token_scores", "gate_scores")}


def read_choice(path: str | Path, config: DeepseekMoeConfig, model: str) -> dict[str, Any]:
    """An `expert_cfg.json`, checked against the model it is for.

    Args:
        path: the file.
        config: the model's.
        model: its name, for errors.

    Raises:
        UserError: it cannot be read, is no such file, or is of another model; one line says what is wrong.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}, the experts to train, is no file: `deepseek-moe esft select` writes one")
    try:
        choice = read_expert_cfg(path)
        check_expert_cfg(choice, config, path, model)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    idle = 0 if config.mtp_loss_weight else config.num_nextn_predict_layers
    for layer, experts in choice["experts"].items():
        if experts and int(layer) >= config.num_hidden_layers + config.num_nextn_predict_layers - idle:
            raise UserError(
                f"{path}: layer {layer} predicts further tokens, and nothing trains it: set losses.mtp_loss_weight, "
                "or take the layer out"
            )
    if not trained_count(choice) and not choice["shared_experts"] and not choice["non_expert_modules"]:
        raise UserError(f"{path} names nothing to train: all its lists of experts are empty")
    return choice


def trained_count(choice: dict[str, Any]) -> int:
    """How many routed experts an `expert_cfg.json` names, in all layers together."""
    return sum(len(experts) for experts in choice["experts"].values())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 1
