"""hooked_model against the transformers model it copies and against the golden evaluation."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers import PreTrainedTokenizerFast as FastTokenizer

from saezoo.errors import SaezooError
from saezoo.hooked import hooked_model

GOLDEN = Path(__file__).parent / "golden"
BOS = "<|endoftext|>"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformer_lens") is None, reason="needs transformer-lens")


def small_config(**changes: Any) -> GPT2Config:
    sizes: dict[str, Any] = {
        "n_layer": 3,
        "n_embd": 64,
        "n_head": 4,
        "n_positions": 32,
        "vocab_size": 512,
    }
    return GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **changes)


def random_gpt2(**changes: Any) -> Any:
    """Random weights; LayerNorm and other biases are not zero, the residual's mean is about 3."""
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(small_config(**changes))
    model.eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln_" in name or name.endswith("bias"):
                weight.add_(0.1 * torch.randn_like(weight))
        model.transformer.wpe.weight.add_(3.0)
    return model


def random_tokens() -> torch.Tensor:
    return torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "saelens_eval.safetensors")


def small_tokenizer() -> Any:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a small text"] * 3, vocab_size=270, special_tokens=[BOS])
    wrap: Any = FastTokenizer
    return wrap(tokenizer_object=bpe._tokenizer, bos_token=BOS, eos_token=BOS)


@pytest.mark.parametrize("n_inner, act", [(None, "gelu_new"), (96, "gelu")])
@torch.no_grad()
def test_hooks_carry_the_centred_residual(n_inner: int | None, act: str) -> None:
    hf_model, tokens = random_gpt2(n_inner=n_inner, activation_function=act), random_tokens()
    hidden = hf_model(tokens, output_hidden_states=True).hidden_states
    _, cache = hooked_model(hf_model).run_with_cache(tokens)
    for layer in range(3):
        centred = hidden[layer] - hidden[layer].mean(-1, keepdim=True)
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_pre"], centred, atol=1e-5, rtol=0)
    assert cache["blocks.0.attn.hook_pattern"].shape == (2, 4, 32, 32)


@torch.no_grad()
def test_the_last_resid_post_is_before_the_final_layer_norm() -> None:
    hf_model, tokens, outputs = random_gpt2(), random_tokens(), []
    hf_model.transformer.h[2].register_forward_hook(lambda *args: outputs.append(args[2]))
    _, cache = hooked_model(hf_model).run_with_cache(tokens)
    assert not outputs  # the caller's hook did not move into the copy
    hf_model(tokens)
    last = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    centred = last - last.mean(-1, keepdim=True)
    torch.testing.assert_close(cache["blocks.2.hook_resid_post"], centred, atol=1e-5, rtol=0)


@torch.no_grad()
def test_log_probabilities_and_loss_are_those_of_transformers() -> None:
    hf_model, tokens = random_gpt2(), random_tokens()
    logits = hf_model(tokens).logits
    model = hooked_model(hf_model)
    torch.testing.assert_close(model(tokens).log_softmax(-1), logits.log_softmax(-1), atol=1e-5, rtol=0)
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model(tokens, return_type="loss"), expected)


@torch.no_grad()
def test_golden_residual_and_ablation(golden: dict[str, torch.Tensor]) -> None:
    hf_model = GPT2LMHeadModel.from_pretrained(GOLDEN / "saelens_eval_model")
    model, tokens = hooked_model(hf_model), golden["tokens"].long()
    name = "blocks.2.hook_resid_pre"
    _, cache = model.run_with_cache(tokens, names_filter=name, stop_at_layer=3)
    torch.testing.assert_close(cache[name], golden["f32.x"], atol=1e-4, rtol=0)
    hooks: list[Any] = [(name, lambda x, hook: torch.zeros_like(x))]
    for fwd_hooks, kind in [([], "without_sae"), (hooks, "with_ablation")]:
        loss = model.run_with_hooks(tokens, fwd_hooks=fwd_hooks, return_type="loss")
        expected = golden[f"all_tokens.f32.per_token.ce_loss_{kind}"].mean()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_stop_at_layer_returns_the_residual_there() -> None:
    model, tokens = hooked_model(random_gpt2()), random_tokens()
    names = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]
    stopped, cache = model.run_with_cache(tokens, names_filter=names, stop_at_layer=2)
    assert set(names) <= set(cache.keys())
    assert torch.equal(stopped, cache["blocks.1.hook_resid_post"])


@pytest.mark.parametrize("frozen", [False, True])
def test_the_callers_model_stays_as_it_was(frozen: bool) -> None:
    hf_model, tokens = random_gpt2().requires_grad_(not frozen), random_tokens()
    hf_model.train()
    state, config = copy.deepcopy(hf_model.state_dict()), hf_model.config.to_dict()
    random_state = torch.get_rng_state()
    model = hooked_model(hf_model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(state[key], value) for key, value in hf_model.state_dict().items())
    assert hf_model.config.to_dict() == config and hf_model.training
    assert {p.requires_grad for p in model.parameters()} == {not frozen}
    before = model(tokens)
    hf_model.requires_grad_(False).transformer.wte.weight.zero_()
    assert torch.equal(model(tokens), before)  # shares no memory, drops nothing out


@pytest.mark.parametrize("saved", [True, False])
def test_text_gets_bos_in_front(saved: bool, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = hooked_model(random_gpt2(), tokenizer)
    ids = tokenizer.encode("a small")
    assert tokenizer.bos_token_id not in ids and tokenizer.pad_token is None
    assert model.to_tokens("a small").tolist() == [[tokenizer.bos_token_id, *ids]]
    assert model.to_tokens("a small", prepend_bos=False).tolist() == [ids]
    assert model.to_str_tokens("a small") == [BOS, *(tokenizer.decode([i]) for i in ids)]


def test_stdout_stays_clean(capsys: pytest.CaptureFixture[str]) -> None:
    model = hooked_model(random_gpt2(), small_tokenizer())
    model.run_with_cache(random_tokens())
    assert capsys.readouterr().out == ""


def test_a_model_without_a_head_is_refused() -> None:
    model: Any = GPT2Model(small_config())
    with pytest.raises(SaezooError, match="GPT2LMHeadModel, got GPT2Model"):
        hooked_model(model)


def test_missing_transformer_lens_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_model = random_gpt2()
    monkeypatch.setattr(sys, "path", [])  # where importlib.metadata looks for packages
    with pytest.raises(SaezooError, match="pip install transformer-lens"):
        hooked_model(hf_model)


def test_import_loads_neither_torch_nor_transformer_lens() -> None:
    code = "import sys, saezoo.hooked; print({'torch', 'transformer_lens'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
