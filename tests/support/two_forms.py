"""For tests of absorbed and expanded latent attention as one attention: force a form, decode, compare.

The expanded form is the reference. All models are float32 with logits up to ten: the same sums in another order
differ by some float32 roundings, at most 1e-5.
"""

import contextlib
import functools

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model

from modeling_deepseek_moe import attention
from modeling_deepseek_moe.attention import DeepseekMoeLatentAttention

ATOL = 1e-5
PAD = 2
ABSORBED, EXPANDED, CHOSEN = True, False, None


@functools.cache
def shared_model(lineage: str, seed: int = 0):
    """For tests that leave it as it is. Without an end token all generations have the length asked for."""
    return tiny_model(tiny_config(lineage, eos_token_id=None, pad_token_id=PAD), seed)


@pytest.fixture
def forms(monkeypatch):
    """`with forms(ABSORBED) as calls:` forces a form, CHOSEN leaves the choice; calls counts each form's runs."""
    absorbed, expanded = DeepseekMoeLatentAttention.absorbed, DeepseekMoeLatentAttention.expanded

    @contextlib.contextmanager
    def forced(form):
        calls = {"absorbed": 0, "expanded": 0}

        def counted(name, run):
            def forward(self, *args, **kwargs):
                calls[name] += 1
                return run(self, *args, **kwargs)

            return forward

        with monkeypatch.context() as patch:
            patch.setattr(DeepseekMoeLatentAttention, "absorbed", counted("absorbed", absorbed))
            patch.setattr(DeepseekMoeLatentAttention, "expanded", counted("expanded", expanded))
            if form is not CHOSEN:
                patch.setattr(attention, "absorbed_is_cheaper", lambda *_: form)
            yield calls

    return forced


def padded(config, lengths=(4, 9, 7), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded rows of unequal lengths."""
    width = max(lengths)
    ids = tiny_ids(config, batch=len(lengths), length=width, seed=seed)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return ids.masked_fill(mask == 0, PAD), mask


def generated(model, ids, mask=None, steps: int = 10, **options):
    """Tokens and, unless beams are searched, the logits they were chosen by."""
    options = {"do_sample": False, "output_logits": "num_beams" not in options, **options}
    torch.manual_seed(0)
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=steps,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        **options,
    )


def assert_same_generation(forms, generate) -> None:
    """`generate` gives the same in both forms and in the one that the model chooses, which absorbs some steps."""
    with forms(EXPANDED) as calls:
        expected = generate()
    assert calls["absorbed"] == 0 < calls["expanded"]
    for form in (ABSORBED, CHOSEN):
        with forms(form) as calls:
            found = generate()
        assert calls["absorbed"] > 0
        assert torch.equal(found.sequences, expected.sequences)
        if expected.logits is not None:
            torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=ATOL)
