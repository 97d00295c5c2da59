"""Bytes that a rank sends while a micro-batch runs forward and backward and its gradients are exchanged.

| collective | what goes through it in each rank | how often |
|---|---|---|
| all-gather | a chunk of each parameter that FSDP cuts | forward and backward; head and last norm once |
| reduce-scatter | the gradient of each such parameter that is trained | once |
| all-reduce | gradients' chunks between replicas, whole ones of copies (DDP, adapters) | once |
| all-to-all | tokens x K x H to the ranks of their experts, and back | forward (twice if checkpointed), backward |
| of TP | outputs of what is cut by rows, gradients of inputs of what is cut by columns, logits | each layer |

What is sent: rings of n ranks send n - 1 parts of what an all-gather makes or a reduce-scatter takes, and of an
all-reduce twice that; of an all-to-all some pairs of token and expert stay where they are. Experts are taken as evenly
loaded; numbers of tokens and scalars are left out.
"""

from dataclasses import dataclass

from .layers import Shape
from .ranks import Layout, Spread

MACHINE = 8  # GPUs
KEPT = ("model.norm.weight", "lm_head.weight")  # what FSDP keeps gathered from the forward to the backward pass
EMBEDDING = "embed_tokens.weight"  # to which, frozen, no gradient comes back


@dataclass(frozen=True)
class Traffic:
    """A kind of collective in all layers.

    Attributes:
        kind: "all-gather", "reduce-scatter", "all-reduce" or "all-to-all".
        payload: bytes of the larger of what a rank gives and what it gets.
        sent: bytes that it sends to other ranks.
        outside: of these, bytes that leave a machine of `MACHINE` GPUs, where ranks of a machine follow each other.
    """

    kind: str
    payload: int
    sent: int
    outside: int


def traffic_of(spreads: list[Spread], layout: Layout, config, shape: Shape, checkpointing: bool) -> list[Traffic]:
    """What a rank of the layout sends.

    Args:
        spreads: of the model's parameters.
        layout: of the ranks.
        config: of the model.
        shape: of the micro-batch on each rank; ranks of tensor parallelism share one.
        checkpointing: layers run forward twice.
    """
    found, further = [], config.num_nextn_predict_layers if config.mtp_loss_weight else 0
    for spread in spreads:
        if spread.is_idle:
            continue
        name, is_trained, over = spread.whole.name, spread.whole.is_trained, spread.over
        chunk = spread.bytes_on(0)  # the first rank's needs no filling up
        batches, stride = layout.shard * layout.replicate, layout.tp
        if spread.is_expert:
            batches, stride = layout.ranks // layout.ep, layout.ep
        if over > 1:
            times = 1 if name.endswith(KEPT) else 2
            if name.endswith(EMBEDDING):
                times = (1 + is_trained) * (1 + further)
            found.append(_ring("all-gather", times * chunk * over, 1, over, stride))
            if is_trained:
                found.append(_ring("reduce-scatter", chunk * over, 1, over, stride))
        if is_trained:
            found.append(_ring("all-reduce", chunk, 2, batches // over, stride * over))
    passes = 3 if checkpointing else 2
    layers = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]
    if layout.ep > 1:
        # Each layer for multi-token prediction has a token of every row less.
        tokens = shape.tokens * sum(layers) + sum(shape.tokens - shape.batch * (1 + each) for each in range(further))
        of_token = config.num_experts_per_tok * config.hidden_size * shape.stream
        payload = 2 * passes * tokens * of_token // layout.tp
        here = min(layout.ep, MACHINE) / layout.ep
        sent = payload * (layout.ep - 1) // layout.ep
        found.append(Traffic("all-to-all", payload, sent, int(payload * (1 - here))))
    if layout.tp > 1:
        found += _of_tensor_parallelism(layout, config, shape, passes, layers)
    return _added_up(found)


def _of_tensor_parallelism(layout: Layout, config, shape: Shape, passes: int, layers: list[bool]) -> list[Traffic]:
    stream = shape.tokens * config.hidden_size * shape.stream
    forward = backward = 0
    for is_moe in layers:
        shared = bool(config.n_shared_experts)
        forward += stream * (1 + (1 + shared if is_moe else 1))
        if config.kv_lora_rank is None:
            inputs = 3 * config.hidden_size
        else:
            queries = config.q_lora_rank or config.hidden_size
            inputs = queries + config.kv_lora_rank + config.qk_rope_head_dim
        backward += shape.tokens * inputs * shape.stream
        if is_moe and layout.ep == 1:
            backward += stream + shape.tokens * config.num_experts_per_tok * shape.stream
        backward += 2 * stream * (shared or not is_moe)
    # A dense layer that runs again stops before its last sum, which no gradient needs.
    again = forward - stream * layers.count(False) if passes == 3 else 0
    of_ends = 2 * stream  # the embedding's output and the gradient of the head's input
    logits = shape.tokens * config.vocab_size * shape.stream
    ring = _ring("all-reduce", forward + again + backward + of_ends, 2, layout.tp, 1)
    return [ring, _ring("all-gather", logits, 1, layout.tp, 1)]


def _ring(kind: str, payload: int, times: int, ranks: int, stride: int) -> Traffic:
    """Traffic of a ring of ranks that are `stride` apart."""
    if ranks == 1:
        return Traffic(kind, 0, 0, 0)
    sent = times * payload * (ranks - 1) // ranks
    in_machine = max(1, min(ranks, MACHINE // stride))
    return Traffic(kind, payload, sent, 0 if in_machine == ranks else sent // in_machine)


def _added_up(found: list[Traffic]) -> list[Traffic]:
    kinds: dict[str, Traffic] = {}
    for each in found:
        before = kinds.get(each.kind, Traffic(each.kind, 0, 0, 0))
        sums = (getattr(before, name) + getattr(each, name) for name in ("payload", "sent", "outside"))
        kinds[each.kind] = Traffic(each.kind, *sums)
    return [each for each in kinds.values() if each.payload]
