"""A tiny random Llama and a tokenizer trained on little text; nothing is downloaded."""

import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPORA = Path(__file__).resolve().parents[1] / "lmcache/cli/corpora"
VOCAB_SIZE = 8192
MAX_POSITIONS = 16384
SEED = 0

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL_TOKENS = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_POSITIONS,
    # At the usual 0.02 attention hardly counts and greedy output repeats one token. At 0.03 one
    # changed token changes the answer, so wrong KV shows; above, bf16 rounding has its say.
    "initializer_range": 0.03,
    "tie_word_embeddings": False,
    "bos_token_id": SPECIAL_TOKENS.index("<|bos|>"),
    "eos_token_id": SPECIAL_TOKENS.index("<|end|>"),
    "pad_token_id": SPECIAL_TOKENS.index("<|pad|>"),
}


def make_tiny_tokenizer(directory: Path) -> Path:
    """Write a byte-level BPE tokenizer with a chat template into `directory`; needs no torch.

    Text that changes often, such as the docs, is not what it is trained on: that would change what the tests send.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "a model may answer with any id"

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(directory))
    return directory


def make_tiny_model(directory: Path) -> Path:
    """Write a four-layer bf16 Llama (36 MB, 4 KiB of KV a token) and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        **COMMON,
    )
    return _write_model(directory, LlamaForCausalLM, config)


def make_tiny_mla_model(directory: Path) -> Path:
    """Write a two-layer bf16 DeepSeek-V2 without experts (2.25 KiB of KV a token) and its tokenizer."""
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    # What FlashAttention's kernel for a GPU takes; on a CPU smaller heads leave the cache server some of the cores.
    head_dim = 128 if torch.cuda.is_available() else 64
    config = DeepseekV2Config(
        num_hidden_layers=2,
        first_k_dense_replace=2,  # no layer has experts
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=None,
        # vLLM's decoding kernel for the CPU takes these two sizes only.
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=head_dim,
        v_head_dim=head_dim,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        **COMMON,
    )
    return _write_model(directory, DeepseekV2ForCausalLM, config)


def _write_model(directory: Path, make: Callable[[Any], Any], config: Any) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = make(config).to(torch.bfloat16)
    model.save_pretrained(str(directory))
    return make_tiny_tokenizer(directory)


def _training_texts() -> Iterator[str]:
    """The corpora, and made-up words: in the corpora alone are 6,985 tokens."""
    for path in sorted(CORPORA.glob("*.txt")):
        yield path.read_text(encoding="utf-8")
    generator = random.Random(SEED)
    yield " ".join("".join(generator.choices(string.ascii_lowercase, k=generator.randrange(3, 9))) for _ in range(2000))
