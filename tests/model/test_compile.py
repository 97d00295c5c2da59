"""torch.compile without a graph break: a training step, and a decode step over a static cache that is compiled once.

Traced and differentiated as one graph but run with eager kernels, results differ from eager mode by the order of
some additions: 2e-5 on logits as everywhere, 1e-5 of the largest entry on gradients. Inductor fuses
and reorders more: 1e-4.
"""

import pytest
import torch
import transformers
from tiny import tiny_config, tiny_ids, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from modeling_deepseek_moe.finetune.model.counting import LoadCounter
from modeling_deepseek_moe.transformers_names import minor_release

# Tracing takes seconds; V3 has all there is but plain attention and the batch-wise balance loss.
LINEAGES = [pytest.param("v1", marks=pytest.mark.slow), pytest.param("v2", marks=pytest.mark.slow), "v3"]
traces_backward = pytest.mark.skipif(
    minor_release(transformers.__version__) < (5, 23),
    reason="before 5.23 transformers' grouped product on CPU cannot be differentiated while it is traced",
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def training_step(lineage: str, **compile_options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradients of one training step with padding, compiled when options are given."""
    overrides = {"aux_loss_alpha": 0.5, **({"mtp_loss_weight": 0.3} if lineage == "v3" else {})}
    model = tiny_model(tiny_config(lineage, **overrides)).train()
    ids = tiny_ids(model.config)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    step = torch.compile(model, fullgraph=True, **compile_options) if compile_options else model
    outputs = step(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
    outputs.loss.backward()
    losses = torch.stack([outputs.loss, outputs.aux_loss] + ([outputs.mtp_loss] if lineage == "v3" else []))
    return losses.detach(), {name: p.grad for name, p in model.named_parameters()}


def model_step(model):
    """The compiled model, and what counts its graphs."""
    counters.clear()
    graphs = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=graphs), graphs


def check_training_step(lineage: str, backend: str, relative: float) -> None:
    (eager_losses, eager), (losses, compiled) = training_step(lineage), training_step(lineage, backend=backend)
    torch.testing.assert_close(losses, eager_losses, atol=relative, rtol=relative)
    for name, gradient in eager.items():
        bound = relative * gradient.abs().max().item() + 1e-9
        torch.testing.assert_close(compiled[name], gradient, atol=bound, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def check_decoding(lineage: str, backend: str, tolerance: float, steps: int = 5) -> None:
    """Every step after the first two must reuse what they compiled."""
    model = tiny_model(tiny_config(lineage))
    ids = tiny_ids(model.config, length=6 + steps)
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(ids[:, :6], past_key_values=cache)
    decode = torch.compile(model, fullgraph=True, backend=backend)
    logits = []
    for step, token in enumerate(ids[:, 6:].split(1, dim=1)):
        with torch.compiler.set_stance("fail_on_recompile" if step >= 2 else "default"):
            logits.append(decode(token, past_key_values=cache).logits.clone())
    expected = model(ids, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=tolerance, rtol=0)


@traces_backward
@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_training_step_is_one_graph_forward_and_backward(lineage):
    check_training_step(lineage, "aot_eager", 1e-5)


@traces_backward
@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "activation checkpointing"]
)
def test_counting_experts_keeps_a_training_step_one_graph(checkpointing):
    """Every pass adds its counts, those that reuse the graph too."""
    model = tiny_model(tiny_config("v3", aux_loss_alpha=0.5, mtp_loss_weight=0.3)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    counter, batches = LoadCounter(model), [tiny_ids(model.config, seed=seed) for seed in range(2)]
    eager = []
    for ids in batches:
        model(ids, labels=ids, use_cache=False)
        eager.append(counter.take())
    step, graphs = model_step(model)
    for ids, expected in zip(batches, eager, strict=True):
        step(ids, labels=ids, use_cache=False).loss.backward()
        assert torch.equal(counter.take(), expected)
    assert graphs.frame_count == 1 and not counters["graph_break"]
    for ids in batches:
        step(ids, labels=ids, use_cache=False)
    assert torch.equal(counter.take(), sum(eager))


@traces_backward
@pytest.mark.slow
@pytest.mark.parametrize("lineage", ["v1", "v3"])
def test_inductor_compiles_a_training_step_with_the_gradients_of_eager_mode(lineage):
    check_training_step(lineage, "inductor", 1e-4)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_decode_step_over_a_static_cache_is_one_graph_traced_once(lineage):
    check_decoding(lineage, "eager", 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lineage", ["v1", "v3"])
def test_inductor_decodes_what_eager_mode_does(lineage):
    check_decoding(lineage, "inductor", 1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_inference_is_one_graph_with_the_other_traceable_expert_implementation():
    model = tiny_model(tiny_config("v3"))
    model.set_experts_implementation("batched_mm")
    ids = tiny_ids(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("lineage", ["v1", "v3"])
@torch.no_grad()
def test_a_cache_filled_by_a_compiled_step_continues_in_eager_mode_and_back(lineage):
    """The growing layer does not write into its buffer while it is traced."""
    model = tiny_model(tiny_config(lineage))
    ids = tiny_ids(model.config, length=9)
    compiled = torch.compile(model, backend="eager")
    cache = DynamicCache(config=model.config)
    chunks = ids.split([4, 1, 1, 1, 2], dim=1)
    runs = (model, compiled, model, model, compiled)
    logits = [run(chunk, past_key_values=cache).logits for run, chunk in zip(runs, chunks, strict=True)]
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, atol=2e-5, rtol=0)
