"""sana15.model.text: Gemma-2 exactly as diffusers' SanaPipeline uses it (tiny random weights), and the mini encoder."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from sana15.model.text import GemmaTextEncoder, MiniTextEncoder, complex_human_instruction
from sana15.storage.files import DataError

PROMPTS = ["A Red circle ", "", "two blue squares left of a star " * 40]


@pytest.fixture(scope="module")
def gemma():
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [complex_human_instruction(), *PROMPTS], 400, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return Gemma2Model(config).eval(), tokenizer


def test_instruction_is_the_released_one():
    text = complex_human_instruction()
    assert len(text) == 1057
    assert text.endswith("User Prompt: ")


def test_equals_diffusers(gemma):
    from diffusers import SanaPipeline

    model, tokenizer = gemma
    ours = GemmaTextEncoder(model, tokenizer)
    pipe = SanaPipeline(tokenizer, model, None, None, None)
    embeds, mask, negative, negative_mask = pipe.encode_prompt(
        PROMPTS, True, negative_prompt=[""] * 3, device=torch.device("cpu"),
        complex_human_instruction=complex_human_instruction().split("\n"),
    )  # fmt: skip
    features, keep = ours.encode(PROMPTS)
    assert features.shape == (3, 300, 16)
    assert torch.equal(features, embeds)
    assert torch.equal(keep, mask)
    features, keep = ours.encode([""] * 3, negative=True)
    assert torch.equal(features, negative)
    assert torch.equal(keep, negative_mask)


def test_save_and_load(gemma, tmp_path):
    model, tokenizer = gemma
    with pytest.raises(FileNotFoundError, match="text_encoder is missing"):
        GemmaTextEncoder.load(tmp_path)
    model.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = GemmaTextEncoder.load(tmp_path, torch.float32)
    expected = GemmaTextEncoder(model, tokenizer).encode(PROMPTS[:1])[0]
    torch.testing.assert_close(loaded.encode(PROMPTS[:1])[0], expected)
    with pytest.raises(ValueError, match="overflows in float16"):
        GemmaTextEncoder.load(tmp_path, torch.float16)


@pytest.mark.parametrize("damage", ["cut", "config", "lacking", "tokenizer"])
def test_damaged_gemma_is_one_clear_error(gemma, tmp_path, damage):
    model, tokenizer = gemma
    model.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    weights = tmp_path / "text_encoder" / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "config":
        (tmp_path / "text_encoder" / "config.json").write_text("{")
    elif damage == "lacking":
        state = load_file(weights)
        del state["layers.1.mlp.up_proj.weight"]
        save_file(state, weights, metadata={"format": "pt"})
    else:
        (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot be loaded|lacks 1 tensors, among them layers\.1\.mlp\.up_proj"):
        GemmaTextEncoder.load(tmp_path)


@pytest.fixture
def mini():
    torch.manual_seed(0)
    return MiniTextEncoder(["a", "red", "circle", "two", "squares"], width=16, heads=2).eval()


def test_mini_ignores_padding(mini):
    with torch.no_grad():
        alone, mask = mini.encode(["A red circle!"])
        batch, batch_mask = mini.encode(["a red circle", "two squares two squares two squares", ""])
    assert mask.all()
    assert batch_mask.sum(1).tolist() == [3, 6, 1]  # the empty prompt is one <null> token
    torch.testing.assert_close(batch[:1, :3], alone)
    assert torch.isfinite(batch).all()


def test_mini_knows_the_order_of_words(mini):
    with torch.no_grad():
        one, other = mini.encode(["red circle two", "two circle red"])[0]
    assert (one[1] - other[1]).abs().max() > 1e-4


def test_mini_bad_prompts(mini):
    with pytest.raises(ValueError, match="does not know 'crimson', 'pentagon'"):
        mini.encode(["a crimson pentagon"])
    with pytest.raises(ValueError, match="reads 24 words, the prompt has 25"):
        mini.encode(["red " * 25])


def test_mini_save_and_load(mini, tmp_path):
    mini.save(tmp_path / "text")
    loaded = MiniTextEncoder.load(tmp_path / "text")
    for (name, a), b in zip(mini.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(a.half().float(), b), name
    assert loaded.tokens(["a red circle"]).tolist() == mini.tokens(["a red circle"]).tolist()
