"""Language models whose hidden states are prompts, with their tokenizers: Gemma 2, Qwen3, Qwen2.5-VL, GLM, Llama."""

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizerFast,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from family_models.text import WIDTH, WORDS, byte_pairs, spelled
from family_models.weights import seeded

GEMMA_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def gemma_tokenizer(limit: int = 256) -> GemmaTokenizerFast:
    """Gemma's byte pairs with bytes for what it cannot spell, and a token at the start."""
    vocabulary, merges = spelled(GEMMA_SPECIALS)
    return GemmaTokenizerFast(vocab=vocabulary, merges=merges, add_bos_token=True, model_max_length=limit)


def gemma_encoder(seed: int = 13) -> Gemma2Model:
    """Embeddings [rows, tokens, WIDTH]: local and global attention in turn, capped scores."""
    config = Gemma2Config(
        vocab_size=len(spelled(GEMMA_SPECIALS)[0]),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
    )
    return seeded(lambda: Gemma2Model(config), seed)


SYSTEM_WORDS = """the image by detailing color shape size texture quantity text spatial relationships objects and
background of"""
QWEN_WORDS = (*(f"Ġ{word}" for word in (*SYSTEM_WORDS.split(), *WORDS)), "system", "user", "assistant", "Describe")
"""With a token for each word of Qwen-Image's system prompt, that prompt has 34 tokens, as the pipeline expects."""
QWEN_VOCABULARY, QWEN_MERGES = byte_pairs(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), words=QWEN_WORDS)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's byte pairs, with the marks of a chat as single tokens."""
    return Qwen2Tokenizer(
        vocab=dict(QWEN_VOCABULARY),
        merges=list(QWEN_MERGES),
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT,
        model_max_length=131072,
    )


def qwen3_encoder(seed: int = 14) -> Qwen3Model:
    """Embeddings [rows, tokens, WIDTH]: normed queries and keys, two of them to one key."""
    return seeded(lambda: Qwen3Model(qwen3_config(layers=2)), seed)


def qwen3_causal(seed: int = 14) -> Qwen3ForCausalLM:
    """The same with a head, which prompts do not use, and three layers."""
    return seeded(lambda: Qwen3ForCausalLM(qwen3_config(layers=3)), seed)


def qwen3_config(*, layers: int) -> Qwen3Config:
    """Qwen3 of WIDTH channels."""
    return Qwen3Config(
        vocab_size=len(QWEN_VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        pad_token_id=QWEN_VOCABULARY["<|endoftext|>"],
    )


def qwen25_encoder(seed: int = 15) -> Qwen2_5_VLForConditionalGeneration:
    """Embeddings [rows, tokens, WIDTH], and a side for images that text to image leaves alone."""
    text = {
        "vocab_size": len(QWEN_VOCABULARY),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000000.0},
        "bos_token_id": QWEN_VOCABULARY["<|endoftext|>"],
        "eos_token_id": QWEN_VOCABULARY["<|im_end|>"],
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return seeded(lambda: Qwen2_5_VLForConditionalGeneration(config), seed)


GLM_SPECIALS = ("<|endoftext|>", "[gMASK]", "<sop>")


def glm_tokenizer() -> PreTrainedTokenizerFast:
    """GLM's byte pairs, with two marks at the start, padded on the left."""
    vocabulary, merges = byte_pairs(GLM_SPECIALS)
    return _byte_level(vocabulary, merges, start=("[gMASK]", "<sop>"), end="<|endoftext|>", padding_side="left")


def glm_encoder(seed: int = 18) -> GlmModel:
    """Embeddings [rows, tokens, WIDTH]: half of each head's channels are turned by position."""
    config = GlmConfig(
        vocab_size=len(byte_pairs(GLM_SPECIALS)[0]),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
    )
    return seeded(lambda: GlmModel(config), seed)


LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>")


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3's byte pairs, with a mark at the start."""
    vocabulary, merges = byte_pairs(LLAMA3_SPECIALS)
    return _byte_level(vocabulary, merges, start=("<|begin_of_text|>",), end="<|end_of_text|>", padding_side="right")


def llama3_encoder(seed: int = 19) -> LlamaForCausalLM:
    """Embeddings [rows, tokens, WIDTH] of every layer."""
    config = LlamaConfig(
        vocab_size=len(byte_pairs(LLAMA3_SPECIALS)[0]),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        output_hidden_states=True,
    )
    return seeded(lambda: LlamaForCausalLM(config), seed)


def _byte_level(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    start: tuple[str, ...],
    end: str,
    padding_side: str,
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(
        single=[*start, "$A"], pair=[*start, "$A", "$B"], special_tokens=[(mark, vocabulary[mark]) for mark in start]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start[0],
        eos_token=end,
        pad_token=end,
        padding_side=padding_side,
        model_max_length=1024,
    )
